"""Probes: sums of disjoint parts of a layer's gradient, by which a gradient is known again after a common factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from ..sharding.layout import Layout, Shard
from ..sharding.local_tensors import local_part, summable

__all__ = ["PROBES", "LocalProbes", "probes", "put_probes", "widened"]

COLUMN_CLASSES = 4
PROBES = 2 * COLUMN_CLASSES
"""Numbers per layer: rows are counted by twos and columns by fours, as a chessboard's squares by their colour. Of all
rows or of all columns the sum would be zero for many layers, e.g. of the one before a softmax."""

STACKED_ELEMENTS = {"cpu": 1 << 15}
LARGE_STACKED_ELEMENTS = 1 << 22  # on accelerators, where launching a kernel costs more than copying
"""Layers of one shape with at most so many elements together are added up at once, as a copy."""


def widened(gradients: torch.Tensor) -> torch.Tensor:
    """Gradients in fp64, filled up with zeros to columns by fours and, of several rows, to an even number of them.

    So that one operation can add up their probes.

    Args:
        gradients: Of one shape, along the first dimension. Rows are along the second one, columns along the last.

    Returns:
        At least three dimensions; the tensor itself if nothing had to be done.
    """
    gradients = summable(gradients)
    if gradients.dim() < 3:
        gradients = gradients.reshape(len(gradients), 1, -1)
    height, width = gradients.shape[1], gradients.shape[-1]
    more_rows, more_columns = height % 2 * (height > 1), -width % COLUMN_CLASSES
    if not (more_rows or more_columns):
        return gradients.to(torch.float64)
    shape = (len(gradients), height + more_rows, *gradients.shape[2:-1], width + more_columns)
    wide = gradients.new_zeros(shape, dtype=torch.float64)
    wide.narrow(1, 0, height).narrow(-1, 0, width).copy_(gradients)
    return wide


def put_probes(wide: torch.Tensor, board: torch.Tensor) -> None:
    """Write the probes of widened gradients into `board`, shape (gradients, PROBES), zero before."""
    rows = min(2, wide.shape[1])
    folded = wide.unflatten(-1, (-1, COLUMN_CLASSES)).unflatten(1, (-1, rows))
    others = [dimension for dimension in range(1, folded.dim() - 1) if dimension != 2]
    classes = board.view(len(board), 2, COLUMN_CLASSES).narrow(1, 0, rows)
    torch.sum(folded, dim=others, out=classes)


def probes(gradient: torch.Tensor, first_row: int = 0, first_column: int = 0) -> torch.Tensor:
    """The probes of a gradient, or of a block of it, shape (PROBES,), fp64.

    Args:
        gradient: All of a layer's gradient, or a block of it. Rows are along the first dimension, of two or more, and
            columns along the last.
        first_row: Where the block begins, so that the blocks' probes add up to the layer's.
        first_column: The same for columns.
    """
    return _probes_of_several([gradient], (first_row % 2, first_column % COLUMN_CLASSES))[0]


def _probes_of_several(gradients: Sequence[torch.Tensor], begin: tuple[int, int]) -> torch.Tensor:
    """The probes of blocks of one shape that begin alike, shape (blocks, PROBES)."""
    stacked = torch.stack(list(gradients)) if len(gradients) > 1 else gradients[0].unsqueeze(0)
    wide = widened(stacked)
    boards = wide.new_zeros(len(gradients), PROBES)
    put_probes(wide, boards)
    if any(begin):
        boards = boards.view(-1, 2, COLUMN_CLASSES).roll(begin, dims=(1, 2)).view(-1, PROBES)
    return boards


@dataclass
class _Stack:
    """Local tensors of one shape that are added up at once.

    Attributes:
        shape: The tensors'.
        begin: The class of row and column in which each begins inside its layer.
        layers: The layers they carry.
        tensors: Their indices.
    """

    shape: torch.Size
    begin: tuple[int, int]
    layers: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)

    def add(self, layer: int, tensor: int) -> None:
        self.layers.append(layer)
        self.tensors.append(tensor)

    def probes(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """Shape (layers, PROBES); None if there is no gradient."""
        found = [gradients[tensor] for tensor in self.tensors]
        like = next((gradient for gradient in found if gradient is not None), None)
        if like is None:
            return None
        zeros = torch.zeros_like(like) if any(gradient is None for gradient in found) else like
        views = [(zeros if gradient is None else gradient).view(self.shape) for gradient in found]
        return _probes_of_several(views, self.begin)


class LocalProbes:
    """The probes of this rank's parts of all layers, in few operations: small layers of one shape share them."""

    def __init__(self, layout: Layout):
        """Find which layers can be added up together.

        Args:
            layout: One whose tensors carry one layer each.
        """
        self._device = layout.numbers_device
        self._stacks = _stacks_of(layout)
        place = {layer: number for number, layer in enumerate(i for stack in self._stacks for i in stack.layers)}
        order = [place.get(layer, len(place)) for layer in range(len(layout.layers))]  # the last is of no layer
        self._order = torch.tensor(order, dtype=torch.long, device=self._device)

    def __call__(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Shape (PROBES, layers), fp64.

        Args:
            gradients: The flat gradients of the layout's tensors.
        """
        parts = [self._of(stack, gradients) for stack in self._stacks]
        return torch.cat([*parts, self._zeros(1)]).index_select(0, self._order).T

    def _of(self, stack: _Stack, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        found = stack.probes(gradients)
        return self._zeros(len(stack.layers)) if found is None else found.to(self._device)

    def _zeros(self, layers: int) -> torch.Tensor:
        return torch.zeros(layers, PROBES, dtype=torch.float64, device=self._device)


def _stacks_of(layout: Layout) -> list[_Stack]:
    stacks: list[_Stack] = []
    open_stacks: dict[object, _Stack] = {}
    for layer, shard in {shard.layer: shard for shard in layout.shards}.items():
        tensor = layout.layers[layer].tensor
        local = local_part(layout.tensors[tensor])
        begin = _begin(layout, shard)
        # Gradients are of their tensors' dtypes.
        key = local.shape, local.dtype, local.device, begin
        stack = open_stacks.get(key)
        limit = STACKED_ELEMENTS.get(local.device.type, LARGE_STACKED_ELEMENTS)
        if stack is None or (len(stack.layers) + 1) * local.numel() > limit:
            stack = open_stacks[key] = _Stack(local.shape, begin)
            stacks.append(stack)
        stack.add(layer, tensor)
    return stacks


def _begin(layout: Layout, shard: Shard) -> tuple[int, int]:
    shape = layout.layers[shard.layer].shape
    row = shard.offset // prod(shape[1:]) if len(shape) > 1 else 0
    column = shard.offset % shape[-1] if shape else 0
    return row % 2, column % COLUMN_CLASSES
