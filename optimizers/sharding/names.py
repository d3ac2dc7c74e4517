"""Which tensors are the model's own parameters, and what their layers are called in the unwrapped model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .living import living
from .observed import ObservedOptimizer

__all__ = ["observed", "unwrapped_names"]

WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
LEADING = "module."

Tensor = TypeVar("Tensor", bound=torch.Tensor)


def observed(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> ObservedOptimizer:
    """An optimizer in the words in which backends are asked, with the model's own parameters as they are now.

    Args:
        optimizer: The innermost one.
        model: Wrapped or not; None to look for the modules of this process.
    """
    if model is not None:
        return ObservedOptimizer(optimizer, unwrapped_names(model.named_parameters()))
    found = _of_living_modules(optimizer)
    parameters = {**{id(p): p for p in _known_to_be_own(optimizer)}, **{key: p for key, (_, p) in found.items()}}
    in_modules = {key: name for key, (name, _) in found.items()}
    given = {id(p): name for name, p in unwrapped_names(_given_names(optimizer, parameters.values()))}
    names = {**dict.fromkeys(parameters), **in_modules, **given}
    return ObservedOptimizer(optimizer, ((names[key], p) for key, p in parameters.items()))


def unwrapped_names(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters by the names that they had before DDP, FSDP1, checkpointing, compiling or an engine."""
    named = [(WRAPPERS.sub("", name), parameter) for name, parameter in named_parameters]
    while named and all(name.startswith(LEADING) for name, _ in named):
        named = [(name.removeprefix(LEADING), parameter) for name, parameter in named]
    yield from named


def _of_living_modules(optimizer: torch.optim.Optimizer) -> dict[int, tuple[str, torch.Tensor]]:
    """All parameters of all modules, by id; the names are those in the outermost module that has them.

    Of several such modules, that one counts which has the most of the optimizer's parameters.
    """
    modules = [module for module in living(torch.nn.Module) if "_modules" in vars(module)]
    inside = {id(child) for module in modules for child in module.children()}
    stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    of_roots = [list(unwrapped_names(m.named_parameters())) for m in modules if id(m) not in inside]
    of_roots.sort(key=lambda named: sum(id(p) in stepped for _, p in named))
    return {id(parameter): (name, parameter) for named in of_roots for name, parameter in named}


def _known_to_be_own(optimizer: Any) -> Iterator[torch.Tensor]:
    """Parameters that are the model's though no module has them."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            # Without other processes there is no wrapper that puts tensors in the parameters' place.
            alone = not (dist.is_available() and dist.is_initialized())
            if alone or (_is_ours(optimizer) and optimizer.was_given(tensor)):
                yield tensor


def _given_names(optimizer: Any, parameters: Iterable[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters that the optimizer was given with a name."""
    if _is_ours(optimizer):
        yield from ((name, p) for p in parameters if (name := optimizer.parameter_name(p)))
        return
    for group in optimizer.param_groups:
        yield from zip(group.get("param_names") or (), group["params"], strict=False)


def _is_ours(optimizer: Any) -> bool:
    """Whether it knows its parameters and their names itself."""
    return callable(getattr(optimizer, "was_given", None))
