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

    def within(self, piece: Piece) -> list[tuple[int, int, int]]:
        """A piece's elements in their order: the position of a first row, how many rows, and how many elements of each.

        Whole rows are together; the first and the last one stand alone where the piece has a part of them. So nothing
        has to be told to the device for each row.
        """
        head = min(-piece.offset % self.width, piece.length)
        whole, tail = divmod(piece.length - head, self.width)
        row = self.position + piece.offset // self.width - self.first
        parts = [(row, 1, head), (row + bool(head), whole, self.width), (row + bool(head) + whole, 1, tail)]
        return [(position, rows, elements) for position, rows, elements in parts if rows and elements]


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
        self.slot_layers = tuple(layer for layer, _ in cut)
        self._slots = _indices([slot for slot, _ in held_slots], layout.numbers_device)
        self._positions = _indices([position for _, position in held_slots], layout.numbers_device)

    def _position(self, layer: int, row: int) -> int | None:
        run = self.runs[layer]
        return run.position + row - run.first if run.first <= row < run.first + run.count else None

    def add_sums(self, totals: torch.Tensor, chunk: Chunk, summand: Summand) -> None:
        """Add a chunk's elements to the sums of their rows: fp64, shape (count,)."""
        elements = summable(summand.elements).to(torch.float64)
        elements = elements.square() if summand.squared else elements
        parts = [part for piece in chunk.pieces for part in self.runs[piece.layer].within(piece)]
        runs = elements.split([rows * width for _, rows, width in parts])
        for (position, rows, width), run in zip(parts, runs, strict=True):
            totals.narrow(0, position, rows).add_(run.view(rows, width).sum(dim=1))

    def spread(self, per_row: torch.Tensor, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """Give each element of a chunk its row's number."""
        parts = [part for piece in chunk.pieces for part in self.runs[piece.layer].within(piece)]
        first, end = min(at for at, _, _ in parts), max(at + rows for at, rows, _ in parts)
        numbers = per_row[first:end].to(dtype)  # of the chunk's rows alone, as a table has many chunks
        spread = [numbers.narrow(0, at - first, rows).unsqueeze(1).expand(rows, width) for at, rows, width in parts]
        return torch.cat([part.reshape(-1) for part in spread])

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
