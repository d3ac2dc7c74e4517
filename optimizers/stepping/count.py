"""How many steps an optimizer has taken, under the key "step" of every group, as schedulers and wrappers read it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..formulas.hyperparameters import is_number

__all__ = ["StepCount", "most_steps", "steps_of", "whole_steps"]


class StepCount:
    """Counts steps that changed something, in all groups alike, on the host and without waiting for the device.

    A wrapper may cut one step into several `step()` calls, of which `Plans.steps_begun` tells.
    """

    def __init__(self) -> None:
        self._counted: int | None = None  # the last step that counts, as `Plans.steps_begun` numbers them
        self._count = 0

    def restart(self) -> None:
        """Go on from what the groups say."""
        self._counted = None

    def add(self, groups: Sequence[dict[str, Any]], steps_begun: int) -> None:
        """Count the step that is under way, if none of its calls has done so.

        Args:
            groups: The call's groups; a number that somebody has put there is where the count goes on from.
            steps_begun: The step's number.
        """
        if steps_begun != self._counted:
            self._counted = steps_begun
            self._count = 1 + most_steps(groups)
        for group in groups:
            group["step"] = self._count


def most_steps(groups: Iterable[Mapping[str, Any]]) -> int:
    """How many steps the groups have taken; 0 if there are none."""
    return max((int(group.get("step", 0)) for group in groups), default=0)


def whole_steps(step: Any) -> int:
    """A number of steps that somebody has given. Raises ValueError if it is none."""
    if not is_number(step) or not 0 <= step < math.inf or int(step) != step:
        raise ValueError(f"step must be the number of steps taken, a whole number, got {step!r}")
    return int(step)


def steps_of(state: Mapping[Any, Any]) -> int:
    """The number of steps that a state has come from, where no group tells: what the layer most often updated says."""
    steps = [values["step"] for values in state.values() if isinstance(values, Mapping) and "step" in values]
    return max((int(torch.as_tensor(step, device="cpu").max()) for step in steps), default=0)
