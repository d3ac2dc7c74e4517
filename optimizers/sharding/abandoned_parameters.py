"""Parameters that an optimizer still has, but that its model no longer uses.

Who shards a model or loads it with `assign=True` may put new parameters in place of those that the optimizer was given,
and tells nobody: from then on the old ones get no gradient, and a step would silently leave them as they are. Most
parameters without a gradient are only unused or frozen, so this looks closely, and therefore seldom.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from typing import Any

import torch

from .layout import LayoutError, listing
from .living import living
from .local_tensors import placements_of

__all__ = ["MissingGradients", "refuse_abandoned"]


class MissingGradients:
    """Tells when to look for abandoned parameters.

    That costs a walk over all objects of the process. So a parameter that is without a gradient step by step is looked
    at in the first, second, fourth, eighth, ... of these steps.
    """

    def __init__(self, count: int):
        self._steps_without = [0] * count

    def ask_for_a_look(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Count one step, and return whether it is time to look."""
        look = False
        for index, tensor in enumerate(tensors):
            if tensor.grad is None and tensor.requires_grad:
                steps = self._steps_without[index] = self._steps_without[index] + 1
                look |= steps & (steps - 1) == 0
        return look


def refuse_abandoned(optimizer: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if other parameters have taken the place of some that the optimizer was given.

    Those are no module's parameters any more and have no gradient, while a module has others like them, which have one
    and which no optimizer trains. If a gradient reaches any tensor outside of modules, as where somebody copies
    gradients to master weights, then being outside says nothing.
    """
    # What a wrapper steps in the parameters' place is outside of modules by design.
    candidates = [tensor for tensor in tensors if optimizer.was_given(tensor) or placements_of(tensor) is not None]
    if not candidates or not _find_abandoned(candidates):
        return
    gc.collect()  # what took their place may be garbage
    abandoned = [
        f"{optimizer.parameter_name(tensor) or 'a parameter'} of shape {tuple(tensor.shape)} (now {description})"
        for tensor, description in _find_abandoned(candidates)
    ]
    if abandoned:
        raise LayoutError(
            "the model has other parameters than the optimizer, whose own get no gradient any more and would stay as "
            f"they are: {listing(abandoned)}. Make the optimizer from model.parameters() after what replaced them: "
            "fully_shard, FullyShardedDataParallel (with use_orig_params=True) or load_state_dict(assign=True)"
        )


def _find_abandoned(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, str]]:
    """The tensors that were replaced, each with a description of what may be in its place."""
    modules = _Modules()
    trained: set[int] = set()
    for candidate in living(torch.nn.Module, torch.optim.Optimizer):
        if isinstance(candidate, torch.nn.Module):
            modules.add(candidate)
        else:
            groups = vars(candidate).get("param_groups", ())
            trained.update(id(parameter) for group in groups for parameter in group["params"])
    outside = [tensor for tensor in tensors if id(tensor) not in modules.parameters]
    if any(tensor.grad is not None for tensor in outside):
        return []
    in_use = modules.with_gradient(trained)
    keys = [(tensor.shape, tensor.dtype) for tensor in outside]
    return [(tensor, in_use[key]) for tensor, key in zip(outside, keys, strict=True) if key in in_use]


class _Modules:
    """The parameters of all modules of this process, by id, with their names."""

    def __init__(self) -> None:
        self.parameters: dict[int, tuple[torch.Tensor, str]] = {}

    def add(self, module: torch.nn.Module) -> None:
        for name, parameter in (getattr(module, "_parameters", None) or {}).items():  # None under construction
            if parameter is not None:
                self.parameters[id(parameter)] = parameter, f"{type(module).__name__}.{name}"

    def with_gradient(self, trained: Collection[int]) -> dict[tuple[torch.Size, torch.dtype], str]:
        """Names by shape and dtype of those that have a gradient and are not among the `trained`."""
        return {
            (shape, parameter.dtype): name
            for key, (parameter, name) in self.parameters.items()
            if key not in trained and parameter.is_leaf and parameter.grad is not None
            for shape in getattr(parameter, "_shapes", None) or (parameter.shape,)  # of FSDP1's flat parameters: many
        }
