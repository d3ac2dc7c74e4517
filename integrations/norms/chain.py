"""From what a program calls its optimizer to the ones that are stepped: through all wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .steps_under_way import has_hooks

__all__ = ["Stepped", "innermost_optimizers", "is_local_sgd", "stepped_by"]

NAMES = ("chained_optimizers", "optimizer", "optim")
"""By which wrappers call what they step: Megatron's chain; accelerate, DeepSpeed, Lightning and Megatron; torch."""

FORWARDING = (
    "accelerate",
    "deepspeed",
    "lightning",
    "lightning_fabric",
    "megatron",
    "pytorch_lightning",
    "torch.distributed.optim.zero_redundancy_optimizer",
)
"""Modules whose wrappers leave the layers' weights to the optimizer inside. Any other may move them besides."""

LOCAL = ("torch.distributed.optim.post_localSGD_optimizer",)
"""Those that let the weights of ranks drift apart, and average them now and then."""

HOLDING_BACK = ("deepspeed", "megatron")
"""Those whose wrappers have tensors of their own stepped."""


@dataclass(frozen=True)
class Stepped:
    """An optimizer to measure.

    Attributes:
        optimizer: Whose parameter groups and gradients count.
        around: A wrapper whose `step()` is the whole step, and which runs no hooks; None if that is the optimizer's.
    """

    optimizer: torch.optim.Optimizer
    around: Any = None


def stepped_by(optimizer: Any, user: str) -> list[Stepped]:
    """Return the optimizers that an optimizer, or its wrapper or engine, finally steps: one, of a chain several.

    Wrappers that only forward are passed through. One that may move the weights itself, as Lookahead does, is measured
    as a whole.

    Args:
        optimizer: Whatever `step()` is called on.
        user: Who asks, for the message.

    Raises:
        TypeError: If it is none of torch's optimizers and wraps none.
    """
    found = list(_stepped(optimizer, None, set()))
    wrong = [one.optimizer for one in found if not isinstance(one.optimizer, torch.optim.Optimizer)]
    if wrong or not found:
        name = type(wrong[0] if wrong else optimizer).__name__
        inside = f" (inside {type(optimizer).__name__})" if wrong and wrong[0] is not optimizer else ""
        raise TypeError(
            f"{user} needs a torch.optim.Optimizer, or a wrapper that has one as `optimizer` or `optim`; got "
            f"{name}{inside}"
        )
    return found


def is_local_sgd(optimizer: Any) -> bool:
    """Whether the ranks that train the same layers have different weights by intention, as far as a wrapper tells."""
    seen: set[int] = set()
    wrappers = [optimizer]
    while wrappers:
        wrapper = wrappers.pop()
        if _comes_from(wrapper, LOCAL):
            return True
        wrappers += _inside(wrapper, seen) or ()
    return False


def innermost_optimizers(optimizer: Any) -> list[Any]:
    """Return what is in all wrappers, whatever it is and whatever they do besides."""
    return list(_innermost(optimizer, set()))


def _innermost(optimizer: Any, seen: set[int]) -> Iterator[Any]:
    inside = _inside(optimizer, seen)
    if inside is None:
        yield optimizer
    for one in inside or ():
        yield from _innermost(one, seen)


def _stepped(optimizer: Any, around: Any, seen: set[int]) -> Iterator[Stepped]:
    inside = _inside(optimizer, seen)
    if inside is None:
        yield Stepped(optimizer, around)
        return
    if _comes_from(optimizer, HOLDING_BACK):
        around = None
    elif around is None and callable(getattr(optimizer, "step", None)) and not _comes_from(optimizer, FORWARDING):
        own, theirs = _tensors([optimizer]), _tensors(inside)
        if has_hooks(optimizer) and not own < theirs:
            yield Stepped(optimizer)
            if theirs <= own:
                return
        around = optimizer
    for one in inside:
        yield from _stepped(one, around, seen)


def _inside(optimizer: Any, seen: set[int]) -> list[Any] | None:
    """What a wrapper steps, None if it is none."""
    seen.add(id(optimizer))
    inside = next((inner for name in NAMES if (inner := getattr(optimizer, name, None)) is not None), None)
    if inside is None or id(inside) in seen:
        return None
    return list(inside) if isinstance(inside, (list, tuple)) else [inside]


def _tensors(optimizers: list[Any]) -> set[int]:
    groups = [group for one in optimizers for group in getattr(one, "param_groups", ())]
    return {id(tensor) for group in groups for tensor in group["params"]}


def _comes_from(optimizer: Any, modules: tuple[str, ...]) -> bool:
    """Whether one of the modules, or one below it, has the class that defines the object's `step`."""
    owner = next((kind for kind in type(optimizer).__mro__ if "step" in vars(kind)), type(optimizer))
    return any(f"{owner.__module__}.".startswith(f"{module}.") for module in modules)
