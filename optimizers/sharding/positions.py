"""Where the elements of a shard are in the whole layer: what is a function of that does not know the sharding."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from .layout import Layer, LayoutError, Shard

__all__ = ["positions", "run_length", "runs"]


def positions(layer: Layer, shard: Shard, local_shape: tuple[int, ...], elements: torch.Tensor) -> torch.Tensor:
    """Positions in the flattened layer.

    Args:
        layer: The layer.
        shard: The part of it.
        local_shape: Of the local tensor that the shard lies in.
        elements: Indices within the shard, int64.

    Raises:
        LayoutError: If the shard is a block whose rows are not known.
    """
    if shard.is_run:
        return elements + shard.offset
    width = _width(layer, shard)
    if width:
        return elements // width * prod(layer.shape[1:]) + elements % width + shard.offset
    if len(local_shape) != len(layer.shape) or prod(local_shape) != shard.length:
        raise LayoutError(
            f"layer {layer.name} of shape {layer.shape} is cut into blocks in which the position of an element is not "
            "known: cut it along its first or its second dimension"
        )
    return _in_box(layer.shape, local_shape, elements) + shard.offset


def runs(layer: Layer, shard: Shard, local_shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of a shard whose elements are neighbours in the whole layer too.

    Args:
        layer: The layer.
        shard: The part of it.
        local_shape: Of the local tensor that the shard lies in.

    Yields:
        First element in the local tensor, its position in the layer, and the length.

    Raises:
        LayoutError: As `positions`.
    """
    length = run_length(layer, shard, local_shape)
    begins = torch.arange(0, shard.length, length, device="cpu")
    for begin, position in zip(begins.tolist(), positions(layer, shard, local_shape, begins).tolist(), strict=True):
        yield shard.start + begin, position, length


def run_length(layer: Layer, shard: Shard, local_shape: tuple[int, ...]) -> int:
    """Elements of each of the shard's `runs`, which all have as many. Arguments and errors as there."""
    if shard.is_run:
        return shard.length
    width = _width(layer, shard)
    if width:
        return width
    positions(layer, shard, local_shape, torch.empty(0, dtype=torch.int64, device="cpu"))  # whether they are known
    length = 1
    for size, here in zip(reversed(layer.shape), reversed(local_shape), strict=True):
        length *= here
        if here < size:
            break
    return length


def _width(layer: Layer, shard: Shard) -> int:
    """How many neighbours a block has of each row, if it is one that is narrower than the layer; else 0."""
    pitch = prod(layer.shape[1:])
    rows = (shard.end - 1) // pitch + 1 - shard.offset // pitch
    width = shard.length // rows
    is_one = width * rows == shard.length and shard.span == (rows - 1) * pitch + width
    return width if is_one else 0


def _in_box(shape: tuple[int, ...], local_shape: tuple[int, ...], elements: torch.Tensor) -> torch.Tensor:
    """Positions from the box's first element on, by the index along each dimension."""
    found, stride = torch.zeros_like(elements), 1
    for size, here in zip(reversed(shape), reversed(local_shape), strict=True):
        found += elements % here * stride
        elements, stride = elements // here, stride * size
    return found
