"""What all ranks do together when a checkpoint is read or written: tell one another, and fail together."""

from __future__ import annotations

import hashlib
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
    """The value of each rank, on every rank: of something small, since each gets as many as there are ranks."""
    if not several_ranks():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_rank(source: int, value: Any) -> Any:
    """The value of one rank, on every rank."""
    values = [value]
    if several_ranks():
        dist.broadcast_object_list(values, src=source)
    return values[0]


def ranks_that_differ(value: Any) -> list[int]:
    """The lowest rank of each set of ranks that have the same value, by its `repr`; none if all have the same.

    Costs a few bytes for each rank, however large the values are.
    """
    lowest: dict[bytes, int] = {}
    for rank, digest in enumerate(of_all_ranks(hashlib.sha256(repr(value).encode()).digest())):
        lowest.setdefault(digest, rank)
    return list(lowest.values()) if len(lowest) > 1 else []


def raise_together(problems: list[str], error: type[Exception] = OptimizerStateError) -> None:
    """Raise the error on every rank if any rank has a problem; all ranks must call this."""
    of_ranks = [of_rank(source, problems) for source in ranks_that_differ(problems)] or [problems]
    different = list(dict.fromkeys(problem for theirs in of_ranks for problem in theirs))
    if different:
        raise error("\n".join(different))


def device_for(tensors_device: torch.device) -> torch.device:
    """Where collectives over all ranks work."""
    if not several_ranks():
        return tensors_device
    assert dist.group.WORLD is not None
    return reduction_device(dist.group.WORLD, tensors_device)
