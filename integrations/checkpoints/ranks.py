"""What all ranks do together when a checkpoint is read or written: tell one another, and fail together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.local_tensors import reduction_device

__all__ = ["OptimizerStateError", "device_for", "of_all_ranks", "raise_together", "rank", "several_ranks"]


class OptimizerStateError(RuntimeError):
    """State that cannot be saved completely, or a file that does not belong to this model and optimizer."""


def rank() -> int:
    """The number of this rank, 0 in one process."""
    return dist.get_rank() if several_ranks() else 0


def several_ranks() -> bool:
    """Whether there are others to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank, on every rank."""
    if not several_ranks():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(problems: list[str]) -> None:
    """Raise OptimizerStateError on every rank if any rank has a problem; all ranks must call this."""
    different = list(dict.fromkeys(problem for theirs in of_all_ranks(problems) for problem in theirs))
    if different:
        raise OptimizerStateError("\n".join(different))


def device_for(tensors_device: torch.device) -> torch.device:
    """Where collectives over all ranks work."""
    if not several_ranks():
        return tensors_device
    assert dist.group.WORLD is not None
    return reduction_device(dist.group.WORLD, tensors_device)
