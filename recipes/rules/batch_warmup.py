"""A batch that grows to its full size over the first part of training, in equal steps."""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchWarmup:
    """Grows the global batch from `smallest` to `largest` over the first `sequences`, in steps of `smallest`.

    Every size below the largest has as many updates as every other, up to one: with m of them, the batch of k times the
    smallest is over when k (k + 1) of m (m + 1) equal parts of the warm-up have been read. As ModernBERT does (Warner
    et al. 2024, arXiv 2412.13663; AnswerDotAI/ModernBERT, src/sequence_packer.py, BatchSizeWarmupScheduler, which
    counts the tokens of each rank).

    Attributes:
        smallest: sequences of the first updates, over all ranks.
        largest: sequences after the warm-up; the last step up to it may be less than `smallest`.
        sequences: that are read until the largest batch begins.

    Raises:
        ValueError: one of them is no whole number from 1, or smallest is above largest.
    """

    smallest: int
    largest: int
    sequences: int

    def __post_init__(self) -> None:
        for name in ("smallest", "largest", "sequences"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        if self.smallest > self.largest:
            raise ValueError(f"smallest must be at most largest, got {self.smallest} and {self.largest}")

    @property
    def steps(self) -> int:
        """Number of sizes below the largest."""
        return (self.largest - 1) // self.smallest

    def batch_at(self, read: int) -> int:
        """Return the batch of the update that follows `read` sequences."""
        size = 1 + bisect.bisect_right(range(1, self.steps + 1), read, key=self.ends)
        return min(size * self.smallest, self.largest)

    def ends(self, size: int) -> int:
        """Return after how many sequences no update begins with the batch of `size` times the smallest any more."""
        return -(-self.sequences * size * (size + 1) // (self.steps * (self.steps + 1)))

    def updates(self, sequences: int) -> int:
        """Return in how many updates a run reads so many sequences; the last one takes what is left."""
        updates = read = 0
        for size in range(1, self.steps + 1):
            batch, end = size * self.smallest, min(self.ends(size), sequences)
            count = max(0, -(-(end - read) // batch))
            updates, read = updates + count, read + count * batch
        return updates + max(0, -(-(sequences - read) // self.largest))
