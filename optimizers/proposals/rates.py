"""Learning rates of groups, set for a while: numbers are replaced, tensors filled in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["at_rate", "set_rate"]


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's rate; a tensor stays the one that it is, which some optimizers insist on, and graphs know.

    But for one of 16 bits, in which large numbers are infinite, and products with a decay are rounded.
    """
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.dtype in (torch.float16, torch.bfloat16):
        group["lr"] = torch.full_like(lr, rate, dtype=torch.float32)
    elif isinstance(lr, torch.Tensor):
        lr.fill_(rate)
    else:
        group["lr"] = rate


@contextmanager
def at_rate(groups: Sequence[dict[str, Any]], rate: float) -> Iterator[None]:
    """Have groups at a rate, and afterwards at what they had; several may share a tensor. Waits for no device."""
    own = [(group, group["lr"]) for group in groups]
    values = [lr.clone() if isinstance(lr, torch.Tensor) else None for _, lr in own]
    for group in groups:
        set_rate(group, rate)
    try:
        yield
    finally:
        for (group, lr), value in zip(own, values, strict=True):
            group["lr"] = lr if value is None else lr.copy_(value)
