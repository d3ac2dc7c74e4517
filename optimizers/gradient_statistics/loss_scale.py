"""The loss scale of torch's GradScaler, which the gradient no longer has when a step gets it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.amp import GradScaler

from ..sharding.living import living

__all__ = ["LossScale"]


class LossScale:
    """Finds the GradScaler that steps an optimizer, and its scale.

    A scaler leaves no reference to itself on an optimizer, but keeps a record of it, from `unscale_` or `step` to
    `update`. All scalers are searched for at the first, second, fourth, eighth, ... step of those that none was found
    to take.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = weakref.ref(optimizer)
        self._scalers: weakref.WeakSet[GradScaler] = weakref.WeakSet()
        self._steps_without = 0

    def now(self, device: torch.device) -> torch.Tensor | float:
        """What the loss of the step's backward passes was multiplied by, on the device; 1 without a scaler."""
        scaler = self._scaler()
        if scaler is None:
            steps = self._steps_without = self._steps_without + 1
            if steps & (steps - 1) == 0:
                self._scalers.update(living(GradScaler))
                scaler = self._scaler()
        scale = None if scaler is None else scaler._scale
        return 1.0 if scale is None else scale.to(device)

    def _scaler(self) -> GradScaler | None:
        key = id(self._optimizer())
        return next((scaler for scaler in self._scalers if key in vars(scaler).get("_per_optimizer_states", ())), None)
