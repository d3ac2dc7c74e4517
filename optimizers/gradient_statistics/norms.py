"""Norms of the gradients of single groups of samples: what a step needs, and what `norms()` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["GroupNorms", "StatisticsError", "StepStatistics"]


class StatisticsError(RuntimeError):
    """An update needs statistics of group gradients that were never collected."""


@dataclass(frozen=True)
class GroupNorms:
    """Norms of one layer's gradients in one step.

    Attributes:
        groups: k, the number of groups.
        mean_norm: Mean of the groups' norms, (1/k) sum ||g_i||.
        mean_square: Mean of their squares, (1/k) sum ||g_i||^2.
        square_of_mean: Squared norm of the mean gradient, ||gbar||^2.
    """

    groups: int
    mean_norm: float
    mean_square: float
    square_of_mean: float


def norms_from_table(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, GroupNorms]:
    """Read a `GradientStatistics.norm_table` that was brought to the host, as its rows."""
    found = {}
    for name, groups, mean_norm, mean_square, square, clipping in zip(names, *rows, strict=True):
        c = clipping or 1.0
        found[name] = GroupNorms(round(groups), mean_norm / c, mean_square / c**2, square / c**2)
    return found


@dataclass(frozen=True)
class StepStatistics:
    """What one `step()` call needs.

    Attributes:
        contributions: Numbers per layer of the layout, fp64, that this rank adds to the step's first sums:
            `group_norm`, the mean of the groups' norms; `group_square`, the mean of their squares; `groups`, their
            number; and `not_finite`, which is 0, or NaN if any gradient of any layer was not finite.
        mean_square: Flat tensors in the order of the layout's: sum of the groups' squares, and the factor that makes
            them the mean. None if squares are not collected.
    """

    contributions: dict[str, torch.Tensor]
    mean_square: tuple[list[torch.Tensor], torch.Tensor] | None
