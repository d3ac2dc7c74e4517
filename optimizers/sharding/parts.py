"""What one rank has of one layer, and where the elements of it lie in the whole layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist

from .layout import Shard

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """What this rank, or the ranks among which a wrapper shards it further, has of a layer.

    Attributes:
        shape: Its own shape.
        whole: The whole layer's shape.
        process_group: The ranks that have the other parts; None where the part is the layer.
        dimension: Along which the layer is cut.
        ranges: The indices along that dimension which the part has, in its order; None where they are not known.
    """

    shape: tuple[int, ...]
    whole: tuple[int, ...]
    process_group: dist.ProcessGroup | None = None
    dimension: int = 0
    ranges: tuple[range, ...] | None = None

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Part:
        """The whole layer."""
        return cls(tuple(shape), tuple(shape))

    @property
    def is_placed(self) -> bool:
        """Whether the positions of its elements in the layer are known."""
        return self.process_group is None or self.ranges is not None

    def shards(self, layer: int, start: int, offset: int, length: int) -> Iterator[Shard]:
        """Where `length` elements of the flattened part, from `offset` on, lie in the layer.

        Where that is not known, the shard counts from the part's first element: sums are right, and checkpoints refuse.

        Args:
            layer: Index of the layer.
            start: The first of these elements in the local tensor.
            offset: The first of them in the part.
            length: Their number, at least 1.
        """
        if self.process_group is None or self.ranges is None:
            yield Shard(layer, start, offset, length)
            return
        inner = prod(self.whole[self.dimension + 1 :])
        row, pitch = (shape[self.dimension] * inner for shape in (self.shape, self.whole))
        at, end = offset, offset + length
        while at < end:
            index, inside = divmod(at, row)
            run, position = self._run_at(inside, inner)
            rows = 1
            if inside == 0 and run == row and self.dimension == 1:
                rows = max(1, (end - at) // row)  # whole rows of one run each are one block
            count = min(run + (rows - 1) * row, end - at)
            span = count + (rows - 1) * (pitch - row)
            yield Shard(layer, start + at - offset, index * pitch + position, count, span)
            at += count

    def _run_at(self, inside: int, inner: int) -> tuple[int, int]:
        """How many elements follow one another in the layer from an element of the part's row on, and its position."""
        assert self.ranges is not None
        for indices in self.ranges:
            size = len(indices) * inner
            if inside < size:
                return size - inside, indices.start * inner + inside
            inside -= size
        raise AssertionError("the part is larger than its ranges")
