"""Hooks on an optimizer's steps and state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .displacement import Scaler

__all__ = ["StepHooks"]


class StepHooks:
    """Calls functions around the steps of one optimizer.

    Args:
        optimizer: The optimizer.
        first: Called when a `step()` begins, before all other hooks of the optimizer.
        see: Called when its gradients are there, after its closure if it has one.
        after: Called when it ends.
        state: Called before its state is saved.
        load: Called before it is loaded.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        first: Callable[[], None],
        see: Callable[[Scaler], None],
        after: Callable[[], None],
        state: Callable[[], None],
        load: Callable[[], None],
    ):
        self._see = see
        uncompiled = torch.compiler.disable
        begin = optimizer.register_step_pre_hook(uncompiled(lambda *_: first()))
        hooks: Any = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(begin.id, last=False)  # so that those of others see the original weights
        self._handles: list[Any] = [
            begin,
            optimizer.register_step_pre_hook(uncompiled(self._before)),
            optimizer.register_step_post_hook(uncompiled(lambda *_: after())),
            optimizer.register_state_dict_pre_hook(lambda *_: state()),
            optimizer.register_load_state_dict_pre_hook(lambda *_: load()),
        ]

    def remove(self) -> None:
        """Call nobody any more."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._look(optimizer)
            return None

        @functools.wraps(closure)
        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            with torch.no_grad():
                self._look(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        said = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        self._see(Scaler(*(one if isinstance(one, torch.Tensor) else None for one in said)))
