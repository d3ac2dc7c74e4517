"""Checks that run once per optimizer, when its first step begins: all is set up by then, and no weight has moved."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from trustratio.optimizers.sharding.backends import Backend

__all__ = ["FirstStepBackend"]


class FirstStepBackend(Backend):
    """A backend with something to check; a subclass fills in `check`."""

    def __init__(self) -> None:
        self._passed: WeakSet[Optimizer] = WeakSet()

    def check(self, optimizer: Any) -> None:
        """Raise if the optimizer, ours or another, would not train as it was asked to."""
        raise NotImplementedError(f"{type(self).__name__} must define check()")

    def before_step(self, optimizer: Optimizer) -> None:
        """Check the optimizer unless it has passed."""
        if optimizer not in self._passed:
            self.check(optimizer)
            self._passed.add(optimizer)
