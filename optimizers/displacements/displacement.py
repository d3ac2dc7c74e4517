"""What `Extrapolation` asks of that which says where the weights go."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

from ..sharding.layout import Layout
from ..sharding.moved_weights import Change

__all__ = ["Displacement", "Scaler"]


class Scaler(NamedTuple):
    """What torch's GradScaler tells an optimizer that unscales gradients itself, as fused ones do; nothing to others.

    Attributes:
        scale: What the gradients are multiplied by.
        found_inf: Greater than zero if the optimizer is going to leave the step out.
    """

    scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def kept(self, new: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """What to keep, without waiting for the device: the new one, or the one before where the step is left out."""
        if self.found_inf is None:
            return new
        return torch.where(self.found_inf.to(new.device) > 0, before, new)


class Displacement:
    """A direction of the size of the weights, which `step_size` is multiplied by.

    Attributes:
        needs_step: Whether there is none before the first step.
        publishes: Whether what moves is what the optimizer steps, and not the model's own weights.
    """

    needs_step = True
    publishes = True

    def check(self, layout: Layout) -> None:
        """Raise LayoutError if the direction cannot be had under the wrapper that made the layout."""

    def see(self, layout: Layout, call: Collection[int], scaler: Scaler) -> None:
        """Look at the gradients when a `step()` call begins.

        Args:
            layout: Of a whole step.
            call: Indices of the local tensors that this call steps.
            scaler: What torch's GradScaler has told the optimizer.
        """

    def moves(self, layout: Layout, number: int, step_size: float) -> tuple[Sequence[torch.Tensor], Change]:
        """Return the tensors that move, and what moves them.

        Args:
            layout: Of a whole step.
            number: How many steps were taken since the first move.
            step_size: Of the move.
        """
        raise NotImplementedError(f"{type(self).__name__} must define moves(): which tensors move, and what moves them")

    def state_dict(self, layout: Layout | None) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any], layout: Layout) -> None:
        """Go on from it. Raises ValueError if it is of other layers."""

    def remove(self) -> None:
        """Look no more, and forget what was kept."""
