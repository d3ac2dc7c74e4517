"""A process group with this process alone in it, for optimizers that use torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["group_of_one"]


@contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """Have a default process group of this process, unless there is one already.

    Args:
        device: "cpu" or "cuda", whose tensors it is to send.
    """
    if not dist.is_available() or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
