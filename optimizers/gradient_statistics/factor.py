"""What the gradient was multiplied by since backward, where no wrapper tells: unscaling, and the user's clipping.

Probes are sums of disjoint parts of a layer's gradient. They are linear, so the average over the ranks of those of all
groups, times the factor, must be those of the gradient at the step: of every layer the same factor, but for rounding.
How much that may be is known from the dtype in which gradients are added up and from how many are added. So a factor
is told from rounding, and a change that is no factor, as clipping by value, from either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..sharding.layout import Layout
from .probes import PROBES

__all__ = ["Factor", "factor_between"]

SURE = 4.0
"""Standard deviations of rounding within which a factor is 1."""

TOLERANCE = 8.0
"""Standard deviations of rounding by which a layer's probes may differ from those of the model's factor."""

LOSSY = 0.01
"""Relative difference of a layer that is left to reductions in fewer bits than the gradient's, as DDP's hooks do."""


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
