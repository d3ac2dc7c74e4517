"""The steps that one of our optimizers has really taken, counted one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trustratio.optimizers import LayerwiseOptimizer

from .steps_under_way import watch_steps

__all__ = ["TakenSteps"]


class TakenSteps:
    """Counts whole steps from now on, each of one `step()` call or several, and tells of each while it is the last.

    A call without any gradient is no step, and one that a loss scale has skipped is not even seen.

    Args:
        optimizer: The optimizer.
        on_taken: Called with the step's number when the next one begins, or at `end_step()`.
        begun: The steps that were taken before.

    Attributes:
        ended: The steps that have been told of, with those before.
    """

    def __init__(self, optimizer: LayerwiseOptimizer, on_taken: Callable[[int], Any], begun: int = 0):
        self.ended = begun
        self._on_taken = on_taken
        self._stepped: set[int] = set()  # ids of the tensors of the step under way
        self._is_taken = False
        self._count: int | None = None
        uncompiled = torch.compiler.disable
        self._handles = watch_steps(optimizer, before=uncompiled(self._before), after=uncompiled(self._after))

    @property
    def taken(self) -> int:
        """The steps that were taken, with the last."""
        return self.ended + self._is_taken

    def end_step(self) -> None:
        """Tell of the last step, unless that is done: whoever steps has come to an end of it."""
        self._stepped.clear()
        if self._is_taken:
            self._is_taken = False
            self.ended += 1
            self._on_taken(self.ended)

    def remove(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: LayerwiseOptimizer, args: Any, kwargs: Any) -> None:
        tensors = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if not self._stepped.isdisjoint(tensors):
            self.end_step()
        self._stepped |= tensors
        self._count = _own_count(optimizer)

    def _after(self, optimizer: LayerwiseOptimizer, args: Any, kwargs: Any) -> None:
        if optimizer.counts_steps:
            self._is_taken |= _own_count(optimizer) != self._count
        else:
            groups = optimizer.param_groups
            self._is_taken |= any(tensor.grad is not None for group in groups for tensor in group["params"])


def _own_count(optimizer: LayerwiseOptimizer) -> int:
    """What the optimizer itself has counted, with those of the training that its state came from."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)
