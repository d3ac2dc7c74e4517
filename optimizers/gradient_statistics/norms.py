"""What comes out of the statistics: what one step needs, and the norms of the last step that users ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..sharding.layout import Layout

__all__ = [
    "HOOKS_ARE_LOST",
    "HOW_TO_BUILD",
    "LOSES_HOOKS",
    "GroupNorms",
    "LastNorms",
    "StatisticsError",
    "StepStatistics",
    "norms_from_table",
]

LOSES_HOOKS = torch.__version__ < "2.10"
"""Under non-reentrant checkpointing, a torch.autograd.Function that keeps a parameter takes its hooks away for good."""
HOOKS_ARE_LOST = LOSES_HOOKS * (
    " Before torch 2.10, torch.utils.checkpoint with use_reentrant=False takes the hooks of a parameter away where a "
    "torch.autograd.Function keeps it, as DeepSpeed's linear layers do in a process that has used ZeRO-3: take a newer "
    "torch, or use_reentrant=True."
)

HOW_TO_BUILD = (
    "Group gradients are seen in backward(): construct the optimizer with the model's own parameters, pass that object "
    "to the wrapper, and let backward() make the gradients. Gradients made in another way are given by "
    f"optimizer.statistics.add_group({{name or parameter: gradient}}), once per group.{HOOKS_ARE_LOST}"
)


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
    norms = {}
    for name, groups, mean_norm, mean_square, square, clipping in zip(names, *rows, strict=True):
        c = clipping or 1.0
        norms[name] = GroupNorms(round(groups), mean_norm / c, mean_square / c**2, square / c**2)
    return norms


class LastNorms:
    """The reduced sums of the last step, of all its `step()` calls; on the device, so that no step waits for them."""

    def __init__(self) -> None:
        self._of_calls: dict[tuple[int, ...], tuple[tuple[str, ...], torch.Tensor]] = {}  # by the ids of the tensors

    def keep(self, layout: Layout, totals: Mapping[str, torch.Tensor], clipping: torch.Tensor) -> None:
        """Keep the sums of one call.

        Args:
            layout: Of the call.
            totals: Its reduced sums, of which "groups", "group_norm", "group_square" and "g" are kept.
            clipping: What clipping multiplied the gradient by, 0-d.
        """
        rows = [totals[name] for name in ("groups", "group_norm", "group_square", "g")]
        names = tuple(layer.name for layer in layout.layers)
        self._of_calls[tuple(map(id, layout.tensors))] = names, torch.stack([*rows, clipping.expand_as(totals["g"])])

    def table(self) -> tuple[list[str], torch.Tensor]:
        """Layer names and a tensor, shape (5, layers), without waiting; see `norms_from_table`."""
        if not self._of_calls:
            return [], torch.zeros(5, 0, dtype=torch.float64, device="cpu")
        names = [name for of_call, _ in self._of_calls.values() for name in of_call]
        return names, torch.cat([rows for _, rows in self._of_calls.values()], dim=1)


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
