"""Which processes feed their own samples into one gradient, for what is counted or measured over samples.

A layout tells over which processes a layer is cut. That need not be the processes that see different samples: under
DDP nothing is cut, and yet every rank has a micro-batch of its own. Which wrapper it is, backends know; DDP, which
needs no backend, is found here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .living import living
from .local_tensors import add_over

__all__ = ["DataParallel", "attribute_of", "ddp_process_group"]


def _none_skipped() -> int:
    return 0


@dataclass(frozen=True)
class DataParallel:
    """The data-parallel side of a training run.

    Attributes:
        process_group: The ranks whose gradients are averaged; None for one process, or a wrapper that is not known.
        skipped_steps: Counts the updates that the wrapper has dropped so far, e.g. after an fp16 overflow.
        replicas: Where replicas are sharded (HSDP): the ranks that hold the same shards. `process_group` is then the
            replica.
    """

    process_group: dist.ProcessGroup | None = None
    skipped_steps: Callable[[], int] = _none_skipped
    replicas: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        """How many ranks there are, of all replicas together."""
        return prod(map(dist.get_world_size, self._groups()))

    def _groups(self) -> list[dist.ProcessGroup]:
        return [group for group in (self.process_group, self.replicas) if group is not None]

    def add(self, counts: torch.Tensor) -> None:
        """Add `counts` over the ranks, in place: one all-reduce if there are several, two with replicas."""
        for group in self._groups():
            add_over(group, counts)


def ddp_process_group(optimizer: Any) -> dist.ProcessGroup | None:
    """The process group of the DDP module that holds the parameters. DDP leaves no reference to itself on them."""
    for module in living(DistributedDataParallel):
        if any(map(optimizer.was_given, module.parameters())):
            return module.process_group
    return None


def attribute_of(owner: Any, name: str) -> Callable[[], int]:
    """Return a function that reads an integer attribute, without keeping its owner alive; 0 once it is gone."""
    reference = weakref.ref(owner)
    return lambda: int(getattr(reference(), name, 0))
