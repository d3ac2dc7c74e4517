"""Grids of learning rates: which is best, whether the grid was wide enough, and where to try next.

A comparison of optimizers at one learning rate each compares the guesses, not the optimizers; and a best rate at the
edge of its grid says only that the grid ended there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

STEP = 3.0
"""Factor between neighbours where a grid is extended: about half a decade."""

LEAST_RATES = 3
"""Fewer rates have no inside, and so no best rate that is known to be one."""


def best_rate(losses: Mapping[float, float]) -> float | None:
    """Return the rate with the smallest finite loss; None if every run diverged."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None


def edge(losses: Mapping[float, float]) -> str | None:
    """Tell on which side the grid ends at its best rate: "lowest", "highest", or None where it is inside.

    A rate beside which the next one diverged is inside. If all diverged, the lowest was still too high.
    """
    best = best_rate(losses)
    if best is None or best == min(losses):
        return "lowest"
    return "highest" if best == max(losses) else None


def next_rate(losses: Mapping[float, float], step: float = STEP) -> float | None:
    """Return the rate that widens the grid beyond its best edge, to two digits; None if the best is inside."""
    side = edge(losses)
    if side is None:
        return None
    rate = min(losses) / step if side == "lowest" else max(losses) * step
    return float(f"{rate:.2g}")


def grid_around(centre: float, count: int, step: float = STEP) -> tuple[float, ...]:
    """Return `count` rates, each `step` times the one before, around `centre`."""
    return tuple(float(f"{centre * step ** (index - (count - 1) / 2):.2g}") for index in range(count))
