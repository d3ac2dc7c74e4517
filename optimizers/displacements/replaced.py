"""Whether another optimizer steps the parameters in place of the one that was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod, WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..sharding.backends import copied_parameters
from ..sharding.layout import LayoutError
from ..sharding.names import observed
from ..sharding.observed import innermost

__all__ = ["ReplacedWatch"]


class ReplacedWatch:
    """Looks at the first step of every other optimizer of the process.

    Args:
        optimizer: The innermost one.
        model: As of `StepLayout`.
        report: Called with the other's class, as a wrapper may have made it, or a program.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None, report: Callable[[str], None]):
        self._optimizer, self._model, self._report = optimizer, model, report
        self._seen: WeakSet[torch.optim.Optimizer] = WeakSet()
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._given = WeakIdKeyDictionary(dict.fromkeys(given))
        reference = WeakMethod(self._look)  # torch has the hook as long as the process lives

        def look(other: torch.optim.Optimizer, *_: Any) -> None:
            alive = reference()
            if alive is not None:
                alive(other)

        self._handle = register_optimizer_step_pre_hook(torch.compiler.disable(look))

    def remove(self) -> None:
        """Look no more."""
        self._handle.remove()

    def _look(self, other: torch.optim.Optimizer) -> None:
        if other is self._optimizer or other in self._seen:
            return
        self._seen.add(other)
        if innermost(other) is not self._optimizer and self._steps_them(other):
            self._report(type(other).__name__)

    def _steps_them(self, other: torch.optim.Optimizer) -> bool:
        """Whether it steps any of the parameters, or what a wrapper has made of them."""
        tensors = [tensor for group in other.param_groups for tensor in group["params"]]
        if any(tensor in self._given for tensor in tensors):
            return True
        asked = observed(other, self._model)
        if all(map(asked.was_given, tensors)):
            return False
        try:
            return any(parameter in self._given for parameter in copied_parameters(asked))
        except LayoutError:
            return False
