"""Which optimizers are within `step()` now, and who is told: a step may take that of its parent's class, or another's.

torch puts hooks around the `step` of every class, so those of one optimizer run twice where a class calls
``super().step()``.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, MethodType
from typing import Any

import torch

__all__ = ["Hook", "has_hooks", "is_inner_step", "watch_steps"]

Hook = Callable[[Any, Any, Any], Any]
"""Takes the optimizer, the arguments of `step` and its keywords; one before a step may return others."""

TORCHS_FILE = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


def is_inner_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook of the optimizer runs for a step that is a part of another step of the same optimizer."""
    return sum(one is optimizer for one in _steps_under_way()) > 1


def has_hooks(optimizer: Any) -> bool:
    """Whether torch runs hooks around the `step` of the optimizer's class: its constructor has called torch's."""
    code = getattr(getattr(type(optimizer), "step", None), "__code__", None)
    return isinstance(optimizer, torch.optim.Optimizer) and code is not None and _is_hooked(code)


def watch_steps(optimizer: Any, *, before: Hook | None = None, after: Hook | None = None) -> list[Any]:
    """Call functions as torch's hooks around each `step()` of an optimizer, which may run no hooks; return handles."""
    if not has_hooks(optimizer):
        return [PatchedStep(optimizer, before, after)]
    handles = [] if before is None else [optimizer.register_step_pre_hook(before)]
    return handles if after is None else [*handles, optimizer.register_step_post_hook(after)]


class PatchedStep:
    """Hooks around the `step()` of what runs none.

    An attribute takes the method's place, as torch's schedulers do it. Copies of the optimizer call nobody.
    """

    def __init__(self, optimizer: Any, before: Hook | None, after: Hook | None):
        self._optimizer, self._former = weakref.ref(optimizer), vars(optimizer).get("step")
        former, watched = self._former, self._optimizer
        self._is_removed = False

        @functools.wraps(optimizer.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            called = args[0]
            is_watched = called is watched() and not self._is_removed
            if is_watched and before is not None:
                args, kwargs = before(called, args, kwargs) or (args, kwargs)
            answer = type(called).step(*args, **kwargs) if former is None else former(*args[1:], **kwargs)
            if is_watched and after is not None:
                after(called, args, kwargs)
            return answer

        self._step = optimizer.step = MethodType(step, optimizer)

    def remove(self) -> None:
        """Call them no more, whoever has put another step around this one."""
        self._is_removed = True
        optimizer = self._optimizer()
        if optimizer is not None and vars(optimizer).get("step") is self._step:
            if self._former is None:
                del optimizer.step
            else:
                optimizer.step = self._former


def _steps_under_way() -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizer of each `step()` that has hooks and has not returned, the innermost first."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if _is_hooked(frame.f_code):
            optimizer = frame.f_locals.get("self")
            if isinstance(optimizer, torch.optim.Optimizer):
                yield optimizer
        frame = frame.f_back


def _is_hooked(code: CodeType) -> bool:
    return code.co_name == "wrapper" and code.co_filename == TORCHS_FILE
