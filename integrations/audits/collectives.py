"""Counts collectives and the bytes that a rank puts into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CollectiveCount"]

NAMESPACES = ("c10d", "_c10d_functional")
NO_DATA = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class CollectiveCount(TorchDispatchMode):
    """Context manager that counts the collectives of everything run inside, DTensor's own ones included.

    Attributes:
        calls: Number of calls by operation.
        bytes: Bytes of the tensors that were handed to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    @property
    def total(self) -> int:
        """Number of all calls."""
        return sum(self.calls.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor takes it apart and calls again, collectives among the parts
        namespace, _, operation = function.name().partition("::")
        operation = operation.partition(".")[0]  # without its overload
        if namespace in NAMESPACES and operation not in NO_DATA:
            self.calls[operation] += 1
            self.bytes += _bytes(args[0])
        return function(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
        return sum(map(_bytes, value))
    return 0
