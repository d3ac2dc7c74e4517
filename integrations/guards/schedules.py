"""Schedules that count updates, wherever they stand in the schedulers of torch that are made of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR

from trustratio.optimizers.sharding.internals import Internals

from .replaced import innermost

__all__ = ["counting_updates"]

INTERNALS = Internals("schedulers that are made of others", "torch", "2.9 to 2.14")


def counting_updates(scheduler: Any, optimizer: Any) -> Iterator[Any]:
    """Yield the schedules of this optimizer that are to be stepped once per update: the scheduler, or parts of it."""
    for part in _with_parts(scheduler):
        if getattr(part, "counts_updates", False) and innermost(part) is optimizer:
            yield part


def _with_parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    if isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        for part in INTERNALS.read(scheduler, "_schedulers"):
            yield from _with_parts(part)
