"""Which optimizers are within `step()` now: a step may take that of its parent's class, or of an optimizer inside it.

torch puts hooks around the `step` of every class, so those of one optimizer run twice where a class calls
``super().step()``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FrameType

import torch

__all__ = ["is_inner_step", "steps_under_way"]

TORCHS_FILE = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


def steps_under_way() -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizer of each `step()` that has hooks and has not returned, the innermost first."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == TORCHS_FILE:
            optimizer = frame.f_locals.get("self")
            if isinstance(optimizer, torch.optim.Optimizer):
                yield optimizer
        frame = frame.f_back


def is_inner_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook of the optimizer runs for a step that is a part of another step of the same optimizer."""
    return sum(one is optimizer for one in steps_under_way()) > 1
