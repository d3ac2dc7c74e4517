"""One step in two of the wrapper's own, where gradients are seen in `step()` alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["RepeatedStep"]


def _always() -> bool:
    return True


@dataclass(frozen=True)
class RepeatedStep:
    """What a wrapper needs so that its step() can be called twice, on the same samples, for one step.

    Attributes:
        hold: Called before the first. The wrapper's scheduler stands still from then on, until what it returns is
            called, before the second: with True, so that the wrapper forgets that it has counted the first; with False
            where there is to be no second.
        gradient_factor: In a step: by what the wrapper has multiplied the loss's gradient, to clip it; does not wait
            for the device.
        is_in_use: Whether the wrapper is still there.
    """

    hold: Callable[[], Callable[[bool], None]]
    gradient_factor: Callable[[], float | torch.Tensor]
    is_in_use: Callable[[], bool] = _always
