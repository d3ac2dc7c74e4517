"""Instances of somebody's optimizer class: made from options, copied, given a rate and stepped."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

__all__ = [
    "copied",
    "make_base",
    "options_of_base",
    "own_of",
    "restore",
    "step_without_hooks",
]


def options_of_base(base_class: type[torch.optim.Optimizer]) -> tuple[list[str], bool]:
    """The names of a class's options, and whether its constructor takes others besides."""
    key: Any = base_class
    return _options_of_base(key)


@functools.cache
def _options_of_base(base_class: type[torch.optim.Optimizer]) -> tuple[list[str], bool]:
    parameters = [*inspect.signature(base_class).parameters.values()][1:]
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in parameters if p.kind not in variadic], any(p.kind is variadic[1] for p in parameters)


def make_base(
    base_class: type[torch.optim.Optimizer], params: Any, lr: Any, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An instance; with lr None, at the class's default rate."""
    constructor: Callable[..., torch.optim.Optimizer] = base_class
    rate = {} if lr is None else {"lr": lr}
    return constructor(params, **rate, **options)


def copied(options: Mapping[Any, Any]) -> dict[Any, Any]:
    """Options for an instance that must not change anybody's: objects that cannot be copied are shared."""
    return {name: _copied(value) for name, value in options.items()}


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever it may raise, as for process groups
        return value


def own_of(kept: Mapping[Any, Any], left_out: Sequence[Any] = ()) -> dict[Any, Any]:
    """What a group, or a state beside that of tensors, has under other keys than these."""
    return {key: value for key, value in kept.items() if not isinstance(key, torch.Tensor) and key not in left_out}


def restore(kept: MutableMapping[Any, Any], began: Mapping[Any, Any], left_out: Sequence[Any] = ()) -> None:
    """Give a group or a state what `own_of` it was once; tensors that it still has are written."""
    for key in own_of(kept, left_out):
        if key not in began:
            del kept[key]
    for key, value in copied(began).items():
        if isinstance(value, torch.Tensor) and isinstance(kept.get(key), torch.Tensor):
            kept[key].copy_(value)
        else:
            kept[key] = value


def step_without_hooks(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    """Take a step that the hooks around every optimizer's step do not see; those around ours do."""
    step: Any = type(optimizer).step
    if "step" in vars(optimizer):  # somebody has put his own there, e.g. what torch.compile has made of it
        vars(optimizer)["step"](*arguments)
    elif getattr(step, "hooked", False):
        step.__wrapped__(optimizer, *arguments)
    else:
        step(optimizer, *arguments)
