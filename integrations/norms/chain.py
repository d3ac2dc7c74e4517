"""From what a program calls its optimizer to the ones that are stepped: through all wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["innermost_of", "innermost_optimizers"]

NAMES = ("chained_optimizers", "optimizer", "optim")
"""By which wrappers call what they step: Megatron's chain; accelerate, DeepSpeed, Lightning and Megatron; torch."""


def innermost_optimizers(optimizer: Any, user: str) -> list[torch.optim.Optimizer]:
    """Return the optimizers that an optimizer, or its wrapper or engine, finally steps: one, of a chain several.

    Args:
        optimizer: Whatever `step()` is called on.
        user: Who asks, for the message.

    Raises:
        TypeError: If it is none of torch's optimizers and wraps none.
    """
    found = innermost_of(optimizer)
    wrong = [one for one in found if not isinstance(one, torch.optim.Optimizer)]
    if wrong or not found:
        name = type(wrong[0] if wrong else optimizer).__name__
        inside = f" (inside {type(optimizer).__name__})" if wrong and wrong[0] is not optimizer else ""
        raise TypeError(
            f"{user} needs a torch.optim.Optimizer, or a wrapper that has one as `optimizer` or `optim`; got "
            f"{name}{inside}"
        )
    return found


def innermost_of(optimizer: Any) -> list[Any]:
    """The same, whatever they are."""
    return list(_innermost(optimizer, set()))


def _innermost(optimizer: Any, seen: set[int]) -> Iterator[Any]:
    seen.add(id(optimizer))
    inside = next((inner for name in NAMES if (inner := getattr(optimizer, name, None)) is not None), None)
    if inside is None or id(inside) in seen:
        yield optimizer
    elif isinstance(inside, (list, tuple)):
        for one in inside:
            yield from _innermost(one, seen)
    else:
        yield from _innermost(inside, seen)
