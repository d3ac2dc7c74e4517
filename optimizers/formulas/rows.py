"""Sums over the rows of a layer, for algorithms that treat each row of an embedding on its own.

A rank keeps one number per row that its shards touch. Most rows lie in one shard, so their sums are complete where
they are measured. A row that a shard boundary cuts lies on two ranks, or on more if it is long: each of those adds its
part to a slot of the step's packed all-reduce. All ranks know all boundaries, so they agree on the slots, of which
there are at most (ranks - 1) per layer, however many rows it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from ..sharding.layout import Layout
from ..sharding.local_tensors import summable
from .chunks import Chunk, Piece, Summand

__all__ = ["RowRun", "Rows"]


@dataclass(frozen=True)
class RowRun:
    """The rows of one layer that this rank's shards touch.

    Attributes:
        width: Elements per row.
        first: Number of the first row in the layer.
        count: How many rows, those in part included.
        position: Where the first row is in the vectors over all rows of the group.
    """

    width: int
    first: int
    count: int
    position: int

    def within(self, piece: Piece) -> tuple[slice, torch.Tensor]:
        """Return the positions of a piece's rows, and how many of the piece's elements each has."""
        end = piece.offset + piece.length
        first, last = piece.offset // self.width, (end - 1) // self.width
        lengths = torch.full((last - first + 1,), self.width, device="cpu")
        lengths[0] -= piece.offset - first * self.width
        lengths[-1] -= (last + 1) * self.width - end
        start = self.position + first - self.first
        return slice(start, start + len(lengths)), lengths


class Rows:
    """The rows on this rank of one parameter group's layers.

    Attributes:
        runs: Each layer's rows, by its index into `Layout.layers`.
        count: How many rows in all: the length of the vectors over rows.
        slot_layers: For each row that is cut anywhere, its layer; the same on all ranks.
    """

    def __init__(self, layout: Layout, layers: Sequence[int]):
        """Find the rows, and agree with all ranks on which are cut: one exchange if a layer is sharded.

        Args:
            layout: Where the shards are.
            layers: Indices of layers, the same on all ranks.
        """
        self.runs: dict[int, RowRun] = {}
        self.count = 0
        for layer in layers:
            width = row_width(layout.layers[layer].shape)
            held = [shard for shard in layout.shards if shard.layer == layer]
            first = min((shard.offset // width for shard in held), default=0)
            end = max((-(-(shard.offset + shard.length) // width) for shard in held), default=0)
            self.runs[layer] = RowRun(width, first, end - first, self.count)
            self.count += end - first
        cut = sorted(_cut_rows(layout, layers))
        held_slots = [
            (slot, p) for slot, (layer, row) in enumerate(cut) if (p := self._position(layer, row)) is not None
        ]
        self.slot_layers = _indices([layer for layer, _ in cut], layout.numbers_device)
        self._slots = _indices([slot for slot, _ in held_slots], layout.numbers_device)
        self._positions = _indices([position for _, position in held_slots], layout.numbers_device)

    def _position(self, layer: int, row: int) -> int | None:
        run = self.runs[layer]
        return run.position + row - run.first if run.first <= row < run.first + run.count else None

    def add_sums(self, totals: torch.Tensor, chunk: Chunk, summand: Summand) -> None:
        """Add a chunk's elements to the sums of their rows: fp64, shape (count,)."""
        elements = summable(summand.elements).to(torch.float64)
        elements = elements.square() if summand.squared else elements
        for piece, part in zip(chunk.pieces, elements.split(chunk.lengths), strict=True):
            positions, lengths = self.runs[piece.layer].within(piece)
            totals[positions] += torch.segment_reduce(part, "sum", lengths=lengths.to(part.device))

    def spread(self, per_row: torch.Tensor, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """Give each element of a chunk its row's number."""
        parts = []
        for piece in chunk.pieces:
            positions, lengths = self.runs[piece.layer].within(piece)
            numbers = per_row[positions].to(dtype)
            parts.append(numbers.repeat_interleave(lengths.to(numbers.device), output_size=piece.length))
        return torch.cat(parts)

    def take_cut(self, totals: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the sums of all cut rows, shape (slots,)."""
        return totals.new_zeros(len(self.slot_layers)).index_copy_(0, self._slots, totals[self._positions])

    def put_cut(self, totals: torch.Tensor, reduced: torch.Tensor) -> None:
        """Complete `totals` by the cut rows' sums over all ranks."""
        totals[self._positions] = reduced[self._slots]


def row_width(shape: Sequence[int]) -> int:
    """Elements per row: of one index of the first dimension; a layer of fewer than two dimensions is one row."""
    return prod(shape[1:]) if len(shape) > 1 else prod(shape)


def _cut_rows(layout: Layout, layers: Sequence[int]) -> set[tuple[int, int]]:
    """(layer, row) pairs that a shard boundary of any rank cuts: each rank knows those in which its shards begin."""
    cut: set[tuple[int, int]] = set()
    for process_group, sharded in layout.reductions:
        wanted = {layer: row_width(layout.layers[layer].shape) for layer in set(layers).intersection(sharded)}
        if not wanted:
            continue
        shards = [shard for shard in layout.shards if shard.layer in wanted and shard.offset % wanted[shard.layer]]
        of_ranks: list[list[tuple[int, int]]] = [[]] * dist.get_world_size(process_group)
        cut_here = [(shard.layer, shard.offset // wanted[shard.layer]) for shard in shards]
        dist.all_gather_object(of_ranks, cut_here, group=process_group)
        cut.update(*of_ranks)
    return cut


def _indices(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
