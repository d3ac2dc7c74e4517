"""Hooks on a model, so that its training is of moved weights and all else of the original ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Attachment"]


class Attachment:
    """Watches a model.

    Args:
        model: What the loop calls; what is inside may be saved.
        move: Called before a forward in training mode with gradients.
        restore: Called before any other forward, and before the model's state is saved.
        load: Called before it is loaded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        move: Callable[[], None],
        restore: Callable[[], None],
        load: Callable[[], None],
    ):
        self._move, self._restore = torch.compiler.disable(move), torch.compiler.disable(restore)
        self._load = load
        # Before what wrappers do in forward, as that gathers the weights.
        self._handles = [model.register_forward_pre_hook(_Hook(self._before_forward), prepend=True)]
        for module in model.modules():
            self._handles.append(module.register_state_dict_pre_hook(_Hook(self._before_state)))
            self._handles.append(module.register_load_state_dict_pre_hook(_Hook(self._before_load)))

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, module: torch.nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._move()
        else:
            self._restore()

    def _before_state(self, *_: Any) -> None:
        self._restore()

    def _before_load(self, *_: Any) -> None:
        self._load()


class _Hook:
    """A hook that copies of the model, and pickles of it, do not have."""

    def __init__(self, method: Callable[..., None] | None = None):
        self._method = method

    def __call__(self, *args: Any) -> None:
        if self._method is not None:
            self._method(*args)

    def __reduce__(self) -> Any:
        return _Hook, ()
