"""Packed rows: the order in which they are visited, and the masked micro-batches of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..rules.global_batch import BatchPlan
from .given_masks import original, shown
from .masking import VALIDATION_EPOCH, MaskedBatch, mask_sequences, masked_as_given, splitmix64
from .shards import TokenRows
from .wordpiece import Vocabulary

_FEISTEL_ROUNDS = 8


class Rows(Protocol):
    """Packed rows (rows, length): an array, or `TokenRows` on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and tokens per row."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.unsignedinteger]:
        """Return the rows with these numbers."""

    def __len__(self) -> int:
        """Return the number of rows."""


class RowOrder:
    """Endless, seeded order of rows: a new permutation every epoch, addressed by position.

    Position p is row permutation(seed, epoch)[p mod rows] of epoch p // rows, whatever the number of ranks, and any
    position can be asked for, so a resumed run continues in the middle of an epoch.

    The permutation is computed where it is asked for and takes no memory: a Feistel network on pairs of numbers
    below ceil(sqrt(rows)), walked until it lands on a row again (J. Black and P. Rogaway, Ciphers with Arbitrary
    Finite Domains, CT-RSA 2002), with SplitMix64 as round function.
    """

    def __init__(self, rows: int, seed: int) -> None:
        """Order `rows` rows by `seed`."""
        self.rows = rows
        self.seed = seed
        self._side = max(1, math.isqrt(rows - 1) + 1) if rows else 1

    def epoch_rows(self, start: int, count: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (epoch, row indices) pieces that cover the positions start .. start + count - 1 in order."""
        while count > 0:
            epoch, offset = divmod(start, self.rows)
            taken = min(count, self.rows - offset)
            yield epoch, self._permuted(epoch, np.arange(offset, offset + taken, dtype=np.uint64))
            start += taken
            count -= taken

    def _permuted(self, epoch: int, positions: NDArray[np.uint64]) -> NDArray[np.int64]:
        key = splitmix64(splitmix64(np.asarray([self.seed % 2**64], dtype=np.uint64)) ^ np.uint64(epoch))
        values = self._network(key, positions)
        while (outside := np.flatnonzero(values >= self.rows)).size:
            values[outside] = self._network(key, values[outside])
        return values.astype(np.int64)

    def _network(self, key: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        side = np.uint64(self._side)
        left, right = values // side, values % side
        for number in range(_FEISTEL_ROUNDS):
            round_key = splitmix64(key ^ np.uint64(number + 1))
            left, right = right, (left + splitmix64(round_key ^ right) % side) % side
        return left * side + right


class MaskedRows:
    """Packed rows with their masking; makes the micro-batches of a step and of a validation."""

    def __init__(
        self, rows: Rows, vocabulary: Vocabulary, probability: float, seed: int, as_given: bool = False
    ) -> None:
        """Mask `rows` (rows, length) with `probability`, seeded by `seed`, or `as_given` with those of `TokenRows`."""
        self.rows = rows
        self.vocabulary = vocabulary
        self.probability = probability
        self.seed = seed
        self.as_given = as_given
        self.order = RowOrder(len(rows), seed)

    def step_batches(self, step: int, plan: BatchPlan, rank: int) -> list[MaskedBatch]:
        """Return this rank's micro-batches of the optimizer step `step` (counted from 0).

        The global batch is the positions step * sequences onwards. Each accumulation round takes the next
        micro * ranks of them, rank by rank.
        """
        stride = plan.micro * plan.ranks
        starts = (step * plan.sequences + i * stride + rank * plan.micro for i in range(plan.accumulation))
        return [self._batch(self.order.epoch_rows(start, plan.micro)) for start in starts]

    def validation_batches(self, micro: int, rank: int, ranks: int, limit: int) -> list[MaskedBatch]:
        """Return this rank's share of the first `limit` rows, masked the same way every time.

        Every rank gets the same number of batches: under ZeRO-3 each forward pass is a collective. A rank that runs
        out of rows reads row 0 again with nothing to predict.
        """
        count = min(limit, len(self.rows))
        rows = np.arange(rank, count, ranks)
        batches = [self._batch([(VALIDATION_EPOCH, rows[i : i + micro])]) for i in range(0, len(rows), micro)]
        most_rows = -(-count // ranks)
        while len(batches) < -(-most_rows // micro):
            spare = self._batch([(VALIDATION_EPOCH, np.zeros(1, dtype=np.int64))])
            batches.append(MaskedBatch(spare.input_ids, spare.positions[:0], spare.labels[:0]))
        return batches

    def _batch(self, pieces: Iterable[tuple[int, NDArray[np.int64]]]) -> MaskedBatch:
        batches = [self._masked(epoch, rows) for epoch, rows in pieces]
        return batches[0] if len(batches) == 1 else join_batches(batches)

    def _masked(self, epoch: int, rows: NDArray[np.int64]) -> MaskedBatch:
        if self.as_given and isinstance(self.rows, TokenRows):
            packed = self.rows.with_masks(rows)
            return masked_as_given(original(packed).astype(np.int64), shown(packed))
        tokens = self.rows[rows].astype(np.int64)
        return mask_sequences(tokens, rows, epoch, self.seed, self.vocabulary, self.probability)


def join_batches(batches: Sequence[MaskedBatch]) -> MaskedBatch:
    """Concatenate batches of rows of one length; masked positions are shifted accordingly."""
    offset = 0
    positions = []
    for batch in batches:
        positions.append(batch.positions + offset)
        offset += batch.input_ids.numel()
    return MaskedBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat(positions),
        torch.cat([batch.labels for batch in batches]),
    )
