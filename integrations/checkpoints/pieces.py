"""Which elements of a layer this rank holds, by position, and how to copy them out of and into the whole layer.

Sums over layers need not know positions; a checkpoint that outlives the sharding must. A shard of a flat tensor is a
run of the flattened layer. A DTensor's local part is a box: along each dimension of the layer some indices, which
follow one another unless two mesh dimensions cut the same dimension of the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.tensor import DTensor

from trustratio.optimizers.sharding.layout import Layout, LayoutError, Shard

from ..fsdp2.placements import local_indices

__all__ = ["Box", "Piece", "Run", "pieces_by_layer"]

ReadBlock = Callable[[tuple[slice, ...]], torch.Tensor]
"""Reads the part of a stored layer that slices along its dimensions select."""


@dataclass(frozen=True)
class Run:
    """Elements `offset` to `offset + length` of the flattened layer, from `start` on in the flattened local tensor."""

    shape: tuple[int, ...]
    start: int
    offset: int
    length: int

    def count_and_position_sum(self) -> tuple[int, int]:
        """The number of elements, and the sum of their positions in the flattened layer."""
        return self.length, self.length * self.offset + self.length * (self.length - 1) // 2

    def copy_to(self, rows: torch.Tensor, first: int, local: torch.Tensor) -> None:
        """Copy what lies in `rows`, which are the layer's rows from `first` on, from the flat local tensor."""
        origin = first * _row_size(self.shape)
        begin, end = max(self.offset, origin), min(self.offset + self.length, origin + rows.numel())
        if begin < end:
            source = local.narrow(0, self.start + begin - self.offset, end - begin)
            rows.view(-1)[begin - origin : end - origin].copy_(source)

    def copy_from(self, read: ReadBlock, local: torch.Tensor) -> None:
        """Fill this rank's elements of the flat local tensor; reads the rows that contain them."""
        row = _row_size(self.shape)
        first, last = self.offset // row, -(-(self.offset + self.length) // row)
        rows = read((slice(first, last),) if self.shape else ()).reshape(-1)
        local.narrow(0, self.start, self.length).copy_(rows.narrow(0, self.offset - first * row, self.length))


@dataclass(frozen=True)
class Box:
    """All elements whose index along each dimension of the layer is among `indices`, from `start` on in local memory.

    They lie in the flattened local tensor in the layer's order.
    """

    shape: tuple[int, ...]
    indices: tuple[torch.Tensor, ...]
    start: int = 0

    @property
    def sizes(self) -> list[int]:
        return [len(index) for index in self.indices]

    def count_and_position_sum(self) -> tuple[int, int]:
        """The number of elements, and the sum of their positions in the flattened layer."""
        count, stride, position_sum = prod(self.sizes), prod(self.shape), 0
        for size, index in zip(self.shape, self.indices, strict=True):
            stride //= size
            position_sum += stride * int(index.sum()) * (count // len(index))
        return count, position_sum

    def copy_to(self, rows: torch.Tensor, first: int, local: torch.Tensor) -> None:
        """Copy what lies in `rows`, which are the layer's rows from `first` on, from the flat local tensor."""
        source = self._of(local).view(self.sizes)
        indices = list(self.indices)
        if indices:
            inside = ((indices[0] >= first) & (indices[0] < first + len(rows))).nonzero().view(-1)
            source, indices[0] = source[inside.to(source.device)], indices[0][inside] - first
        if source.numel():
            rows[_selection(indices, rows.device)] = source.to(rows.device)

    def copy_from(self, read: ReadBlock, local: torch.Tensor) -> None:
        """Fill the flat local tensor; reads the smallest block that contains its elements."""
        block = read(tuple(slice(int(index.min()), int(index.max()) + 1) for index in self.indices))
        for dimension, index in enumerate(self.indices):
            if block.shape[dimension] != len(index):
                block = block.index_select(dimension, index - index.min())
        self._of(local).copy_(block.reshape(-1))

    def _of(self, local: torch.Tensor) -> torch.Tensor:
        return local.narrow(0, self.start, prod(self.sizes))


Piece = Run | Box


def pieces_by_layer(layout: Layout) -> list[list[Piece]]:
    """For each layer of the layout, what this rank holds of it."""
    pieces: list[list[Piece]] = [[] for _ in layout.layers]
    for shard in layout.shards:
        layer = layout.layers[shard.layer]
        if not isinstance(layout.tensors[layer.tensor], DTensor):
            pieces[shard.layer].extend(_runs(layer.shape, shard))
    rows_before: Counter[int] = Counter()  # tensor -> rows of the layers that it carries before this one
    for index, layer in enumerate(layout.layers):
        tensor = layout.tensors[layer.tensor]
        if isinstance(tensor, DTensor):
            box = _box(layer.name, tensor, layer.shape, rows_before[layer.tensor])
            rows_before[layer.tensor] += layer.shape[0] if layer.shape else 1
            pieces[index] = [box] if prod(box.sizes) else []
    return pieces


def _runs(shape: tuple[int, ...], shard: Shard) -> list[Run]:
    """A shard as runs of the layer: a block that is narrower than the layer is one in each of its rows."""
    if shard.is_run:
        return [Run(shape, shard.start, shard.offset, shard.length)]
    row = _row_size(shape)
    rows = (shard.end - 1) // row + 1 - shard.offset // row
    width = shard.length // rows
    return [Run(shape, shard.start + index * width, shard.offset + index * row, width) for index in range(rows)]


def _box(name: str, tensor: DTensor, shape: tuple[int, ...], first_row: int) -> Box:
    """What this rank holds of the layer that is `tensor`, or its rows from `first_row` on."""
    indices = local_indices(name, tensor)
    local_shape = [len(index) for index in indices]
    if list(tensor.to_local().shape) != local_shape:
        raise LayoutError(
            f"layer {name} has a local part of shape {tuple(tensor.to_local().shape)} where its placements "
            f"{tensor.placements} ask for {tuple(local_shape)}"
        )
    start = 0
    if tuple(tensor.shape) != shape:
        before, inside = indices[0] < first_row, (indices[0] >= first_row) & (indices[0] < first_row + shape[0])
        start = int(before.sum()) * prod(local_shape[1:])
        if not (indices[0].diff() > 0).all():
            raise LayoutError(f"layer {name} is a segment of a parameter whose rows are not in order on this rank")
        indices[0] = indices[0][inside] - first_row
    return Box(shape, tuple(indices), start)


def _selection(indices: list[torch.Tensor], device: torch.device) -> tuple[slice | torch.Tensor, ...]:
    """The indices as slices where all of them follow one another, else as index tensors of an open mesh."""
    if all(int(index[-1]) - int(index[0]) + 1 == len(index) for index in indices):
        return tuple(slice(int(index[0]), int(index[-1]) + 1) for index in indices)
    shapes = [[-1 if d == dimension else 1 for d in range(len(indices))] for dimension in range(len(indices))]
    return tuple(index.to(device).view(shape) for index, shape in zip(indices, shapes, strict=True))


def _row_size(shape: tuple[int, ...]) -> int:
    return prod(shape[1:])
