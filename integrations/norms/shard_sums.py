"""Numbers of the layers over the elements that are on this rank, and how they become those of whole layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.formulas.chunks import Chunk, Flattened, cut_into_chunks, squares
from trustratio.optimizers.sharding.layout import Layout
from trustratio.optimizers.sharding.local_tensors import compute_dtype

__all__ = ["MOST_KEPT", "SQUARES", "ShardSums", "Slots"]

SQUARES, NONZERO, LARGEST = range(3)
MOST_KEPT = 64
"""Sets of layers whose order is kept."""


class ShardSums:
    """Measures the shards of a layout, chunk by chunk, and waits for nothing.

    Attributes:
        layout: Where they are.
        chunks: Their pieces.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.chunks = cut_into_chunks(layout)
        self._orders: dict[tuple[int, ...], tuple[list[int], torch.Tensor]] = {}

    def read(self, tensors: Sequence[torch.Tensor | None], chunk: Chunk) -> torch.Tensor:
        """A chunk's elements of tensors that lie like the local ones, in the dtype of arithmetic."""
        dtype = compute_dtype(self.layout.tensors[chunk.pieces[0].tensor])
        return chunk.read(Flattened(tensors), dtype)[0]

    def numbers(self, elements: Callable[[Chunk], torch.Tensor], wanted: Collection[int]) -> torch.Tensor:
        """Sum of squares, count of nonzero elements and largest absolute value, shape (3, layers), fp64.

        Args:
            elements: Returns those of a chunk.
            wanted: Indices of the local tensors that are gone over; the others' layers get zeros.
        """
        parts = [part for chunk in self.chunks if (part := chunk.only(wanted.__contains__))]
        of_pieces: tuple[list[Any], ...] = ([], [], [])
        for part in parts:
            values = elements(part)
            nonzero, largest = part.extent(values)
            of_pieces[SQUARES].extend(part.sums(squares(values)))
            of_pieces[NONZERO].extend(nonzero)
            of_pieces[LARGEST].extend(largest)
        layers = tuple(chain.from_iterable(part.layers for part in parts))
        return torch.stack(
            [
                self.of_layers(of_pieces[SQUARES], layers, "sum"),
                self.of_layers(of_pieces[NONZERO], layers, "sum"),
                self.of_layers(of_pieces[LARGEST], layers, "max"),
            ]
        )

    def squares(self, elements: Callable[[Chunk], torch.Tensor], wanted: Collection[int]) -> torch.Tensor:
        """The sums of squares alone, shape (layers,)."""
        parts = [part for chunk in self.chunks if (part := chunk.only(wanted.__contains__))]
        sums = [one for part in parts for one in part.sums(squares(elements(part)))]
        return self.of_layers(sums, tuple(chain.from_iterable(part.layers for part in parts)), "sum")

    def of_layers(self, of_pieces: Sequence[torch.Tensor], layers: tuple[int, ...], how: str) -> torch.Tensor:
        """Combine the numbers of pieces per layer, in a fixed order; shape (layers,), fp64, zero without pieces."""
        device, count = self.layout.numbers_device, len(self.layout.layers)
        if not of_pieces:
            return torch.zeros(count, dtype=torch.float64, device=device)
        if layers not in self._orders:
            if len(self._orders) == MOST_KEPT:  # layers that are left out at random are other ones in every step
                self._orders.clear()
            order = sorted(range(len(layers)), key=layers.__getitem__)
            lengths = torch.bincount(torch.tensor(layers, device="cpu"), minlength=count).to(device)
            self._orders[layers] = order, lengths
        order, lengths = self._orders[layers]
        values = torch.stack([of_pieces[piece] for piece in order]).to(device=device, dtype=torch.float64)
        # The lengths are not checked, since that would wait for the device.
        return torch.segment_reduce(values, how, lengths=lengths, axis=0, unsafe=True, initial=0.0)


class Slots:
    """Rows of a sum of which each rank fills its own, so that a maximum travels in a sum.

    Args:
        layout: Over whose reductions it goes.
    """

    def __init__(self, layout: Layout):
        self.count, self.here = 1, 0
        groups = [group for group, _ in layout.reductions]
        if len(groups) == 1:
            self.count, self.here = dist.get_world_size(groups[0]), dist.get_rank(groups[0])
        elif groups:
            self.count, self.here = dist.get_world_size(), dist.get_rank()

    def spread(self, largest: torch.Tensor) -> torch.Tensor:
        """Put this rank's numbers, shape (n, layers), into its rows; shape (ranks * n, layers)."""
        rows = largest.new_zeros(self.count, *largest.shape)
        rows[self.here] = largest
        return rows.flatten(0, 1)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks, shape (n, layers), from the rows that were added up."""
        return rows.unflatten(0, (self.count, -1)).amax(dim=0)
