"""Elements that two ways to the same number leave apart, because something of them is kept with 16 bits."""

from __future__ import annotations

import math

import torch

__all__ = ["FEW", "IN_NORMS", "without_neighbours"]

FEW = 1e-3
"""Share of a layer's elements, and one at least, whose numbers of 16 bits may be rounded to neighbours: a gradient that
differs in the last of 24 bits, as where it was clipped, has about one in 2^15 rounded so."""

NEIGHBOUR = 2.0**-4
"""How far rounding state takes such an element at most, of the way that elements go in the mean: 2^-8 of its own."""

IN_NORMS = 2.0**-16
"""What such elements change of the norms that all elements of a layer go by, relative."""


def without_neighbours(apart: torch.Tensor, path: float, steps: torch.Tensor | None = None) -> torch.Tensor:
    """Distances of a layer's elements with zeros for the farthest few, if rounding to 16 bits explains these.

    Args:
        apart: Of two runs.
        path: Length of the layer's path in one of them.
        steps: What rounding of the weights explains of each element; None where they are not rounded.
    """
    flat = apart.flatten().clone()
    few = flat.topk(min(flat.numel(), max(1, math.ceil(FEW * flat.numel())))).indices
    explained = torch.full_like(flat, NEIGHBOUR * path / max(1, flat.numel()) ** 0.5)
    if steps is not None:
        explained += steps.flatten()
    flat[few] = torch.where(flat[few] <= explained[few], 0.0, flat[few])
    return flat
