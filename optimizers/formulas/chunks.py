"""Cuts the shards of a layout into chunks that stay in cache, and lets algorithms read and write them.

An algorithm is written once, as plain tensor arithmetic on flat tensors `x.w`, `x.g` and its state. The same lines
serve a piece of one large layer (numbers of the layer are 0-d tensors) and many small layers packed together (they are
spread to one value per element), so a step needs no temporary larger than a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..sharding.layout import Layout
from ..sharding.local_tensors import has_fp64, summable
from .block_sums import sums_in_blocks

__all__ = ["Chunk", "Flattened", "Summand", "counts", "cut_into_chunks", "largest", "multiply", "squares", "values"]

CHUNK_ELEMENTS = {"cpu": 1 << 17}
LARGE_CHUNK_ELEMENTS = 1 << 24  # on accelerators, where launching a kernel costs more than missing the cache


@dataclass(frozen=True)
class Summand:
    """Elements whose layer sums are wanted; made by `squares`, `values`, `counts` or `largest`."""

    elements: torch.Tensor
    squared: bool
    bins: int = 0


def squares(elements: torch.Tensor) -> Summand:
    """Ask for each layer's sum of squares."""
    return Summand(elements, squared=True)


def values(elements: torch.Tensor) -> Summand:
    """Ask for each layer's plain sum."""
    return Summand(elements, squared=False)


def counts(bin_of_element: torch.Tensor, bins: int) -> Summand:
    """Ask for each layer's histogram: how many elements (int64) equal 0, 1, ..., bins - 1; `bins` is not counted."""
    return Summand(bin_of_element, squared=False, bins=bins)


def largest(elements: torch.Tensor) -> Summand:
    """Ask for each layer's largest square, in a stage of `maxima_over_layers`."""
    return Summand(elements, squared=True)


class Flattened(Sequence[Any]):
    """Flat views of contiguous tensors, made where they are needed; None stays None."""

    def __init__(self, tensors: Sequence[torch.Tensor | None]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        tensor = self.tensors[index]
        return None if tensor is None else tensor.detach().view(-1)


@dataclass(frozen=True)
class Piece:
    """A run of one shard: `length` elements from `start` in local tensor `tensor`, from `offset` in layer `layer`.

    `shard` is its index in the layout. Of a shard that is no run of the layer, `offset` counts from its first element.
    """

    tensor: int
    layer: int
    start: int
    length: int
    offset: int
    shard: int


@dataclass(frozen=True)
class Chunk:
    """Pieces of one parameter group, of one dtype, that are worked on together."""

    group: int
    pieces: tuple[Piece, ...]

    @functools.cached_property
    def layers(self) -> list[int]:
        return [piece.layer for piece in self.pieces]

    @functools.cached_property
    def lengths(self) -> list[int]:
        return [piece.length for piece in self.pieces]

    @functools.cached_property
    def _sent(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def _layers_and_lengths(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the pieces, on the device; sent there once, since that waits."""
        if device not in self._sent:
            self._sent[device] = torch.tensor(self.layers, device=device), torch.tensor(self.lengths, device=device)
        return self._sent[device]

    @functools.cached_property
    def numel(self) -> int:
        return sum(self.lengths)

    def only(self, wanted: Callable[[int], bool]) -> Chunk | None:
        """The pieces of those local tensors (by index) that are wanted, None if there are none."""
        kept = tuple(piece for piece in self.pieces if wanted(piece.tensor))
        if len(kept) == len(self.pieces):
            return self
        return Chunk(self.group, kept) if kept else None

    def unlike(self, layers: int) -> tuple[Chunk, ...]:
        """Itself, or if it has as many elements as there are layers, two that are as much.

        Else a formula that forgets to spread a vector of layers would multiply elements by it one by one. As it is, the
        shapes do not match.
        """
        if self.numel != layers or layers == 1:
            return (self,)
        *before, last = self.pieces
        if not before:
            before = [replace(last, length=1)]
            last = replace(last, start=last.start + 1, offset=last.offset + 1, length=last.length - 1)
        return Chunk(self.group, tuple(before)), Chunk(self.group, (last,))

    def is_run(self) -> bool:
        """Whether the pieces are one contiguous run of one local tensor, so that a view needs no copy."""
        return all(a.tensor == b.tensor and a.start + a.length == b.start for a, b in pairwise(self.pieces))

    def read(self, flats: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """Return the chunk's elements as one flat tensor of `dtype`, and whether it aliases `flats`."""
        if self.is_run():
            source = flats[self.pieces[0].tensor].narrow(0, self.pieces[0].start, self.numel)
            return source.to(dtype), source.dtype == dtype
        return torch.cat(self._views(flats)).to(dtype), False

    def write(self, flats: Sequence[torch.Tensor], elements: torch.Tensor) -> None:
        """Copy `elements` (flat, any dtype) to where `read` took them from."""
        torch._foreach_copy_(self._views(flats), list(elements.split(self.lengths)))

    def sums(self, summand: Summand) -> list[torch.Tensor]:
        """Each piece's sum, accumulated in fp64, as 0-d tensors (of shape (bins,) for counts)."""
        if summand.bins:
            return self._histograms(summand.elements, summand.bins)
        parts = summand.elements.split(self.lengths)
        if not has_fp64(summand.elements.device):
            return sums_in_blocks(parts, squared=summand.squared)
        if summand.squared and summand.elements.is_cpu:  # where norms in fp64 of fp32 are slow
            return [torch.dot(part, part) for part in summand.elements.to(torch.float64).split(self.lengths)]
        if summand.squared:
            return [norm.square_() for norm in torch._foreach_norm(list(parts), 2, torch.float64)]
        return [part.sum(dtype=torch.float64) for part in parts]

    def largest(self, summand: Summand) -> list[torch.Tensor]:
        """Each piece's largest square, fp64, as 0-d tensors where numbers of layers are; NaN if any element is."""
        found = torch._foreach_norm(list(summand.elements.split(self.lengths)), float("inf"))
        return [summable(number).to(torch.float64).square_() for number in found]

    def extent(self, elements: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each piece's count of elements that are not zero, and its largest absolute value, as 0-d tensors.

        A chunk has no more elements than fp32 can count.
        """
        parts = list(elements.split(self.lengths))
        return list(torch._foreach_norm(parts, 0)), list(torch._foreach_norm(parts, float("inf")))

    def _histograms(self, bin_of_element: torch.Tensor, bins: int) -> list[torch.Tensor]:
        device = bin_of_element.device
        # A chunk has no more elements than fp32 can count.
        dtype = torch.float64 if has_fp64(device) else torch.float32
        table = torch.zeros(len(self.pieces), bins + 1, dtype=dtype, device=device)
        if len(self.pieces) > 1:
            first = torch.arange(len(self.pieces), device=device) * (bins + 1)
            _, lengths = self._layers_and_lengths(device)
            bin_of_element = bin_of_element + first.repeat_interleave(lengths, output_size=self.numel)
        # bincount would wait for the device.
        table.view(-1).scatter_add_(0, bin_of_element, table.new_ones(()).expand(self.numel))
        return list(summable(table).to(torch.float64)[:, :bins])

    def spread(self, per_layer: torch.Tensor, first_layer: int, dtype: torch.dtype) -> torch.Tensor:
        """Give each element its layer's number: a 0-d tensor for one layer, else one value per element."""
        if len(self.pieces) == 1:
            return per_layer[self.pieces[0].layer - first_layer]
        layers, lengths = self._layers_and_lengths(per_layer.device)
        numbers = per_layer[layers - first_layer]
        if numbers.dtype != torch.bool:
            numbers = numbers.to(dtype)
        return numbers.repeat_interleave(lengths, output_size=self.numel)

    def _views(self, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [flats[piece.tensor].narrow(0, piece.start, piece.length) for piece in self.pieces]


def multiply(tensors: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> None:
    """Multiply each tensor, in place, by its 0-d factor."""
    if tensors:
        torch._foreach_mul_(list(tensors), list(factors))


def cut_into_chunks(layout: Layout) -> list[Chunk]:
    """Cut every shard into pieces of bounded length and pack neighbouring small ones."""
    chunks: list[Chunk] = []
    pending: list[Piece] = []

    def flush() -> None:
        if pending:
            chunks.append(Chunk(layout.groups[pending[0].tensor], tuple(pending)))
            pending.clear()

    for index, shard in enumerate(layout.shards):
        carrier = layout.layers[shard.layer].tensor
        limit = CHUNK_ELEMENTS.get(layout.tensors[carrier].device.type, LARGE_CHUNK_ELEMENTS)
        for start in range(0, shard.length, limit):
            length = min(limit, shard.length - start)
            piece = Piece(carrier, shard.layer, shard.start + start, length, shard.offset + start, index)
            if pending and not _fit_together(layout, pending, piece, limit):
                flush()
            pending.append(piece)
    flush()
    return chunks


def _fit_together(layout: Layout, pending: list[Piece], piece: Piece, limit: int) -> bool:
    before, after = layout.tensors[pending[0].tensor], layout.tensors[piece.tensor]
    return (
        sum(p.length for p in pending) + piece.length <= limit
        and layout.groups[pending[0].tensor] == layout.groups[piece.tensor]
        and before.dtype == after.dtype
    )
