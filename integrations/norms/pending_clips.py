"""Clips that wait for gradients which a wrapper holds back until its step, and what clips have done to this step's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PendingClip", "clip_now", "note_clip"]

_pending: WeakIdKeyDictionary = WeakIdKeyDictionary()  # optimizer -> PendingClip
_noted: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # optimizer -> whether its gradients were clipped since its last step


class PendingClip:
    """One clip, at the next step of an optimizer, in all its calls. A later one takes its place.

    Args:
        optimizer: The innermost one.
        stepped: Ids of all tensors of its step.
        clip: Clips the gradients of the call that begins, and returns whether it made any smaller.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, stepped: frozenset[int], clip: Callable[[], bool | torch.Tensor]
    ):
        self._waiting = set(stepped)
        self._clip = clip
        self._said: bool | torch.Tensor | None = None  # of the call under way
        if optimizer in _pending:
            _pending[optimizer].remove()
        _pending[optimizer] = self
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.apply() and None),
            optimizer.register_step_post_hook(self._after),
        ]

    def apply(self) -> bool | torch.Tensor:
        """Clip, once per call."""
        if self._said is None:
            self._said = self._clip()
        return self._said

    def remove(self) -> None:
        """Clip no more."""
        for handle in self._handles:
            handle.remove()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._said = None
        self._waiting -= {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if not self._waiting:
            self.remove()
            _pending.pop(optimizer, None)


def note_clip(optimizer: torch.optim.Optimizer, clipped: bool | torch.Tensor) -> None:
    """Note, until its next step has ended, that the optimizer's gradients were clipped, or would have been if large."""
    if optimizer not in _noted:

        def forget(*_: Any) -> None:
            _noted.pop(optimizer, None)
            handle.remove()

        handle = optimizer.register_step_post_hook(forget)
    _noted[optimizer] = clipped


def clip_now(optimizer: torch.optim.Optimizer) -> list[bool | torch.Tensor]:
    """Let the pending clip of an optimizer, whose step begins, do its work; whether any clip made gradients smaller."""
    pending: PendingClip | None = _pending.get(optimizer)
    said = [] if pending is None else [pending.apply()]
    return said + ([_noted[optimizer]] if optimizer in _noted else [])
