"""Cuts the shards of a layout into chunks that stay in cache, and lets algorithms read and write them.

An algorithm is written once, as plain tensor arithmetic on flat tensors `x.w`, `x.g` and its state. The same lines
serve a piece of one large layer (numbers of the layer are 0-d tensors) and many small layers packed together (they are
spread to one value per element), so a step needs no temporary larger than a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..sharding.layout import Layout
from ..sharding.local_tensors import compute_dtype

if TYPE_CHECKING:
    from .rows import Rows

__all__ = ["Chunk", "ChunkView", "Summand", "counts", "cut_into_chunks", "squares", "values"]

CHUNK_ELEMENTS = {"cpu": 1 << 17}
LARGE_CHUNK_ELEMENTS = 1 << 24  # on accelerators, where launching a kernel costs more than missing the cache


@dataclass(frozen=True)
class Summand:
    """Elements whose layer sums are wanted; made by `squares`, `values` or `counts`."""

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


@dataclass(frozen=True)
class Piece:
    """A run of one shard: `length` elements from `start` in local tensor `tensor`, from `offset` in layer `layer`."""

    tensor: int
    layer: int
    start: int
    length: int
    offset: int


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
        if summand.squared and summand.elements.is_cpu:  # where norms in fp64 of fp32 are slow
            return [torch.dot(part, part) for part in summand.elements.to(torch.float64).split(self.lengths)]
        if summand.squared:
            return [norm.square_() for norm in torch._foreach_norm(list(parts), 2, torch.float64)]
        return [part.sum(dtype=torch.float64) for part in parts]

    def _histograms(self, bin_of_element: torch.Tensor, bins: int) -> list[torch.Tensor]:
        device = bin_of_element.device
        table = torch.zeros(len(self.pieces), bins + 1, dtype=torch.float64, device=device)
        if len(self.pieces) > 1:
            first = torch.arange(len(self.pieces), device=device) * (bins + 1)
            _, lengths = self._layers_and_lengths(device)
            bin_of_element = bin_of_element + first.repeat_interleave(lengths, output_size=self.numel)
        # bincount would wait for the device.
        table.view(-1).scatter_add_(0, bin_of_element, table.new_ones(()).expand(self.numel))
        return list(table[:, :bins])

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


class ChunkView:
    """What an algorithm sees of a chunk.

    `x.w` and `x.g` are the weights and the gradient, flat, in fp32 (fp64 for fp64 parameters). Element-wise state is
    read by its name, e.g. `x.exp_avg`, and may be updated in place: the view holds a scratch copy until `store`.
    `x.of(vector)` spreads a vector with one number per layer of the parameter group over the chunk's elements, and
    `x.of_rows(vector)` one with a number per row, in groups whose rows are measured.
    """

    def __init__(
        self,
        chunk: Chunk,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        state: Mapping[str, Sequence[torch.Tensor]],
        first_layer: int,
        rows: Rows | None = None,
        inputs: Mapping[str, tuple[Sequence[torch.Tensor], torch.Tensor]] | None = None,
        *,
        in_place: bool,
    ):
        """Read a chunk.

        Args:
            chunk: Which elements.
            weights: Flat local tensors.
            gradients: Their flat gradients; None counts as zero.
            state: Flat element-wise state by name.
            first_layer: Index of the group's first layer in the layout.
            rows: The group's rows, where they are measured.
            inputs: Further flat tensors by name, which are read only, each with a factor.
            in_place: Update state where it lies if no conversion or packing is needed, instead of in a scratch copy.
        """
        self._chunk = chunk
        self._weights = weights
        self._state = state
        self._first_layer = first_layer
        self._rows = rows
        self._inputs = inputs or {}
        self._in_place = in_place
        self._scratch: dict[str, torch.Tensor] = {}
        self.dtype = compute_dtype(weights[chunk.pieces[0].tensor])
        self.w, self._w_is_view = chunk.read(weights, self.dtype)
        self.g = self._read_gradient(gradients)

    def _read_gradient(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        pieces = self._chunk.pieces
        if all(gradients[piece.tensor] is not None for piece in pieces):
            return self._chunk.read(gradients, self.dtype)[0]  # type: ignore[arg-type]
        runs = [(gradients[piece.tensor], piece) for piece in pieces]
        return torch.cat(
            [
                self.w.new_zeros(piece.length)
                if flat is None
                else flat.narrow(0, piece.start, piece.length).to(self.dtype)
                for flat, piece in runs
            ]
        )

    def __getattr__(self, name: str) -> torch.Tensor:
        state, inputs = self.__dict__.get("_state", {}), self.__dict__.get("_inputs", {})
        if name in inputs:
            flats, factor = inputs[name]
            self.__dict__[name] = scaled = self._chunk.read(flats, self.dtype)[0] * factor.to(self.dtype)
            return scaled
        if name not in state:
            raise AttributeError(f"a chunk has w, g, {list(inputs)} and the state {list(state)}, not {name}")
        elements, is_view = self._chunk.read(state[name], self.dtype)
        if not (is_view and self._in_place):
            elements = elements.clone() if is_view else elements
            self._scratch[name] = elements
        self.__dict__[name] = elements
        return elements

    def of(self, per_layer: torch.Tensor) -> torch.Tensor:
        """Spread a vector of the group's layers, shape (layers,), so that it multiplies the chunk's elements."""
        return self._chunk.spread(per_layer, self._first_layer, self.dtype)

    def of_rows(self, per_row: torch.Tensor) -> torch.Tensor:
        """Spread a vector of the group's rows on this rank, shape (rows,), over the chunk's elements."""
        assert self._rows is not None, "the optimizer's has_rows() is False for this group"
        return self._rows.spread(per_row, self._chunk, self.dtype)

    def store(self, change: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Subtract `change` from the weights and keep the updated state.

        Args:
            change: Flat, the chunk's elements.
            where: Boolean, broadcastable to the elements: those that may change. Everything if None.
        """
        for name, new in self._scratch.items():
            if where is not None:
                new = torch.where(where, new, self._chunk.read(self._state[name], self.dtype)[0])
            self._chunk.write(self._state[name], new)
        if where is not None:
            change = torch.where(where, change, torch.zeros_like(change))
        self.w.sub_(change)
        if not self._w_is_view:
            self._chunk.write(self._weights, self.w)


def cut_into_chunks(layout: Layout) -> list[Chunk]:
    """Cut every shard into pieces of bounded length and pack neighbouring small ones."""
    chunks: list[Chunk] = []
    pending: list[Piece] = []

    def flush() -> None:
        if pending:
            chunks.append(Chunk(layout.groups[pending[0].tensor], tuple(pending)))
            pending.clear()

    for shard in layout.shards:
        carrier = layout.layers[shard.layer].tensor
        limit = CHUNK_ELEMENTS.get(layout.tensors[carrier].device.type, LARGE_CHUNK_ELEMENTS)
        for start in range(0, shard.length, limit):
            length = min(limit, shard.length - start)
            piece = Piece(carrier, shard.layer, shard.start + start, length, shard.offset + start)
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
