"""How many steps an optimizer has taken, under the key "step" of every group, as schedulers and wrappers read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["StepCount", "steps_of"]


class StepCount:
    """Counts steps that changed something, in all groups alike, on the host and without waiting for the device.

    A wrapper may cut one step into several `step()` calls, one after the other for parts of the model. They are one
    step until a tensor comes up again.
    """

    def __init__(self) -> None:
        self._tensors: set[int] = set()  # ids of those that this step's calls have had so far
        self._count = 0

    def restart(self) -> None:
        """Go on from what the groups say."""
        self._tensors = set()

    def add(self, groups: Sequence[dict[str, Any]], tensors: Iterable[torch.Tensor]) -> None:
        """Count one `step()` call.

        Args:
            groups: The call's groups; a number that somebody has put there is where the count goes on from.
            tensors: The local tensors that the call has stepped.
        """
        ids = set(map(id, tensors))
        if not self._tensors or not self._tensors.isdisjoint(ids):
            self._tensors = ids
            self._count = 1 + max(int(group.get("step", 0)) for group in groups)
        else:
            self._tensors |= ids
        for group in groups:
            group["step"] = self._count


def steps_of(state: Mapping[Any, Any]) -> int:
    """The number of steps that a state has come from, where no group tells: what the layer most often updated says."""
    steps = [values["step"] for values in state.values() if isinstance(values, Mapping) and "step" in values]
    return max((int(torch.as_tensor(step, device="cpu").max()) for step in steps), default=0)
