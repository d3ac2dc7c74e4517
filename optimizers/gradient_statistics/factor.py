"""What the gradient was multiplied by since backward, where no wrapper tells: unscaling, and the user's clipping.

Probes are sums of disjoint parts of a layer's gradient. They are linear, so the average over the ranks of those of all
groups, times the factor, must be those of the gradient at the step: of every layer the same factor, but for rounding.
How much that may be is known from the dtype in which gradients are added up and from how many are added. So a factor
is told from rounding, and a change that is no factor, as clipping by value, from either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..sharding.layout import Layout
from ..sharding.local_tensors import local_part, summable

__all__ = ["PROBES", "Factor", "factor_between", "probes", "probes_of"]

COLUMN_CLASSES = 4
PROBES = 2 * COLUMN_CLASSES
"""Numbers per layer: rows are counted by twos and columns by fours, as a chessboard's squares by their colour. Of all
rows or of all columns the sum would be zero for many layers, e.g. of the one before a softmax."""

SURE = 4.0
"""Standard deviations of rounding within which a factor is 1."""

TOLERANCE = 8.0
"""Standard deviations of rounding by which a layer's probes may differ from those of the model's factor."""

LOSSY = 0.01
"""Relative difference of a layer that is left to reductions in fewer bits than the gradient's, as DDP's hooks do."""


def probes(gradient: torch.Tensor, first_row: int = 0, first_column: int = 0) -> torch.Tensor:
    """The probes of a gradient, or of a block of it, shape (PROBES,), fp64.

    Args:
        gradient: All of a layer's gradient, or a block of it. Rows are along the first dimension, of two or more, and
            columns along the last.
        first_row: Where the block begins, so that the blocks' probes add up to the layer's.
        first_column: The same for columns.
    """
    gradient = summable(gradient)
    if gradient.dim() < 2:
        gradient = gradient.reshape(1, -1)
    height, width = gradient.shape[0], gradient.shape[-1]
    if height % 2 == 0 and width % COLUMN_CLASSES == 0:
        folded = gradient.unflatten(-1, (width // COLUMN_CLASSES, COLUMN_CLASSES)).unflatten(0, (height // 2, 2))
        others = [dimension for dimension in range(folded.dim() - 1) if dimension != 1]
        board = folded.sum(dim=others, dtype=torch.float64)
    else:
        parts = [gradient[i::2, ..., j::COLUMN_CLASSES] for i in range(2) for j in range(COLUMN_CLASSES)]
        board = torch.stack([part.sum(dtype=torch.float64) for part in parts]).view(2, COLUMN_CLASSES)
    if first_row % 2 or first_column % COLUMN_CLASSES:
        board = board.roll((first_row % 2, first_column % COLUMN_CLASSES), dims=(0, 1))
    flat: torch.Tensor = board.reshape(-1)
    return flat


def probes_of(layout: Layout, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The probes of this rank's part of each layer's gradient, shape (PROBES, layers).

    Args:
        layout: One whose tensors carry one layer each.
        gradients: The flat gradients of the layout's tensors.
    """
    zeros = torch.zeros(PROBES, dtype=torch.float64, device=layout.numbers_device)
    found = [zeros for _ in layout.layers]
    for shard in layout.shards:
        layer = layout.layers[shard.layer]
        gradient = gradients[layer.tensor]
        if gradient is not None:
            local = gradient.view(local_part(layout.tensors[layer.tensor]).shape)
            several = len(layer.shape) > 1
            row = shard.offset // prod(layer.shape[1:]) if several else 0
            column = shard.offset % layer.shape[-1] if layer.shape else 0
            found[shard.layer] = probes(local, row, column).to(layout.numbers_device)
    return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Factor:
    """What the gradient was multiplied by; on the device, and found without waiting for it.

    Attributes:
        value: The factor, 0-d, fp64; exactly 1 within rounding.
        disagrees: Of which layers it is not the factor, shape (layers,), bool.
    """

    value: torch.Tensor
    disagrees: torch.Tensor


def factor_between(
    layout: Layout, seen: torch.Tensor, now: torch.Tensor, mean_square: torch.Tensor, additions: torch.Tensor
) -> Factor:
    """Find the factor, in which each layer weighs as much as its probes exceed what rounding makes of them.

    Args:
        layout: Of the `step()` call.
        seen: Average over the ranks of the probes that were seen in backward, shape (PROBES, layers).
        now: The same of the gradients now.
        mean_square: The sum of the squared norms of the groups' gradients over the ranks squared, shape (layers,):
            what the squared norm of `seen`'s gradient is if groups have nothing in common.
        additions: How many numbers are added up for an element of the gradient, shape (layers,).
    """
    # Each addition rounds a partial sum; about half of their squares, however the groups' gradients lie to each other,
    # is as much as the last sum's. The error of one rounding is evenly spread, with a variance of ulp^2 / 12.
    # A layer whose gradient was zeroed takes no part.
    present = (now != 0).any(dim=0)
    seen = torch.where(present, seen, 0.0)
    size = mean_square + seen.square().sum(dim=0)
    # Numbers near zero are rounded to multiples of the smallest one, which in fp16 is no small part of small gradients.
    smallest = layout.smallest_gradient.square()
    noise = (size * layout.gradient_resolution.square() / 24 + layout.elements * smallest / 12) * additions
    weight = torch.where(noise > 0, 1 / noise, torch.zeros_like(noise))
    information = (seen.square() * weight).sum()
    factor = (now * seen * weight).sum() / information
    deviation = (information * PROBES).rsqrt() + 1e-15
    is_one = ((factor - 1).abs() <= SURE * deviation) | (information == 0)
    factor = torch.where(is_one, torch.ones_like(factor), factor)

    difference = (now - factor * seen).square().sum(dim=0)
    allowed = factor.square() * (TOLERANCE**2 * noise + LOSSY**2 * size)
    return Factor(factor, (difference > allowed) & present)
