"""Checks that run once per optimizer, when its first step begins: all is set up by then, and no weight has moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

__all__ = ["FirstStepCheck"]


class FirstStepCheck:
    """A check for `Backend.before_step`, which is called at every step: passes an optimizer that has passed before.

    Args:
        check: Raises if the optimizer, ours or another, would not train as it was asked to.
    """

    def __init__(self, check: Callable[[Any], None]) -> None:
        self._check = check
        self._passed: WeakSet[Optimizer] = WeakSet()

    def __call__(self, optimizer: Optimizer) -> None:
        if optimizer not in self._passed:
            self._check(optimizer)
            self._passed.add(optimizer)
