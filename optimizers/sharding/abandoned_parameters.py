"""Parameters that an optimizer still has, but that its model no longer uses.

Who shards a model or loads it with `assign=True` may put new parameters in place of those that the optimizer was given,
and tells nobody: from then on the old ones get no gradient, and a step would silently leave them as they are. Most
parameters without a gradient are only unused or frozen, so what is watched is the place that each has in a module.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .layout import LayoutError, listing
from .living import living
from .local_tensors import placements_of

__all__ = ["Places"]


@dataclass(frozen=True)
class _Place:
    """Where a module has a parameter."""

    module: weakref.ref[torch.nn.Module]
    name: str

    def parameter(self) -> torch.Tensor | None:
        """What is there now."""
        module = self.module()
        return None if module is None else module._parameters.get(self.name)

    def has_gradient(self) -> bool:
        parameter = self.parameter()
        return parameter is not None and parameter.is_leaf and parameter.grad is not None

    def __str__(self) -> str:
        return f"{type(self.module()).__name__}.{self.name}"


class Places:
    """The places of an optimizer's parameters in the modules of the process, for one plan.

    To find them costs a walk over all objects of the process: in the first step in which a parameter has no gradient,
    and again only where a parameter without a gradient sees another one, which has one, in its place.
    """

    def __init__(self) -> None:
        self._of: dict[int, list[_Place]] | None = None  # by the parameter's id

    def refuse_abandoned(self, optimizer: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Raise LayoutError if other parameters have taken the place of some that the optimizer was given.

        Those are no module's parameters any more and have no gradient, while a module has others of their shape, or of
        their name in the model, which have one and which no optimizer trains. If a gradient reaches any tensor outside
        of modules, as where somebody copies gradients to master weights, then being outside says nothing.
        """
        without = [tensor for tensor in tensors if tensor.grad is None and tensor.requires_grad]
        if not without or (self._of is not None and not any(map(self._is_taken, without))):
            return
        # What a wrapper steps in the parameters' place is outside of modules by design.
        own = [tensor for tensor in tensors if optimizer.was_given(tensor) or placements_of(tensor) is not None]
        self._of = {}
        if own:
            modules = _look_for_replacements(optimizer, own)
            _refuse(optimizer, modules.replaced())
            self._of = modules.places()

    def _is_taken(self, tensor: torch.Tensor) -> bool:
        assert self._of is not None
        places = self._of.get(id(tensor), ())
        return any(place.parameter() is not tensor and place.has_gradient() for place in places)


def _look_for_replacements(optimizer: Any, tensors: Sequence[torch.Tensor]) -> _Modules:
    modules = _Modules(optimizer, tensors)
    if modules.replaced():
        del modules
        gc.collect()  # what took their place may be garbage
        modules = _Modules(optimizer, tensors)
    return modules


def _refuse(optimizer: Any, replaced: Sequence[tuple[torch.Tensor, _Place]]) -> None:
    abandoned = [
        f"{optimizer.parameter_name(tensor) or 'a parameter'} of shape {tuple(tensor.shape)} (now {place})"
        for tensor, place in replaced
    ]
    if abandoned:
        sharded = any(placements_of(tensor) is not None for tensor, _ in replaced)
        broken_off = (
            ". If an exception in forward or backward was caught: fully_shard's whole parameters stay in the modules "
            "after it, so make model and optimizer anew, from a checkpoint"
        )
        raise LayoutError(
            "the model has other parameters than the optimizer, whose own get no gradient any more and would stay as "
            f"they are: {listing(abandoned)}. Make the optimizer from model.parameters() after what replaced them: "
            "fully_shard, FullyShardedDataParallel (with use_orig_params=True), to_empty or "
            f"load_state_dict(assign=True){broken_off if sharded else ''}"
        )


class _Modules:
    """The places of all parameters of this process, and where others may have taken those of an optimizer's tensors."""

    def __init__(self, optimizer: Any, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._names = {id(tensor): optimizer.parameter_name(tensor) for tensor in tensors}
        self._modules: list[torch.nn.Module] = []
        self._found: dict[int, tuple[torch.Tensor, _Place]] = {}
        self._trained: set[int] = set()
        for candidate in living(torch.nn.Module, torch.optim.Optimizer):
            if isinstance(candidate, torch.nn.Module):
                self._add(candidate)
            else:
                groups = vars(candidate).get("param_groups", ())
                self._trained.update(id(parameter) for group in groups for parameter in group["params"])
        self._substitutes = self._find_substitutes()

    def _add(self, module: torch.nn.Module) -> None:
        if "_modules" in vars(module):  # it is not under construction
            self._modules.append(module)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._found[id(parameter)] = parameter, _Place(weakref.ref(module), name)

    def places(self) -> dict[int, list[_Place]]:
        """By a tensor's id: its place, or those of others like it if it has none."""
        found = self._found
        inside = {id(tensor): [found[id(tensor)][1]] for tensor in self._tensors if id(tensor) in found}
        return inside | {id(tensor): places for tensor, places in self._substitutes}

    def replaced(self) -> list[tuple[torch.Tensor, _Place]]:
        """The tensors that have no place, and the place of one like each of them that has a gradient."""
        with_gradient = (
            (tensor, next(filter(_Place.has_gradient, places), None)) for tensor, places in self._substitutes
        )
        return [(tensor, place) for tensor, place in with_gradient if place is not None]

    def _find_substitutes(self) -> list[tuple[torch.Tensor, list[_Place]]]:
        """The tensors that have no place, and where others that no optimizer trains have their name or shape."""
        outside = [tensor for tensor in self._tensors if id(tensor) not in self._found]
        if not outside or any(tensor.grad is not None for tensor in outside):
            return []
        untrained: dict[torch.Size, list[_Place]] = {}
        for key, (parameter, place) in self._found.items():
            if key not in self._trained:
                # Of FSDP1's flat parameters: many shapes.
                for shape in getattr(parameter, "_shapes", None) or (parameter.shape,):
                    untrained.setdefault(shape, []).append(place)
        models = self._models()
        return [(tensor, [*self._named(tensor, models), *untrained.get(tensor.shape, ())]) for tensor in outside]

    def _models(self) -> list[torch.nn.Module]:
        """The modules by whose names the optimizer knows its tensors: any of these is there by its name."""
        named = [(tensor, name) for tensor in self._tensors if (name := self._names[id(tensor)]) is not None]
        heads = {name.partition(".")[0] for _, name in named}
        return [
            module
            for module in self._modules
            if not (heads.isdisjoint(module._modules) and heads.isdisjoint(module._parameters))  # quick to tell
            and any(place.parameter() is tensor for tensor, name in named if (place := _place_of(module, name)))
        ]

    def _named(self, tensor: torch.Tensor, models: Sequence[torch.nn.Module]) -> list[_Place]:
        """Where an untrained parameter has the tensor's name, whatever its shape: as a resized embedding has."""
        found = (_place_of(model, self._names[id(tensor)] or "") for model in models)
        return [place for place in found if place is not None and id(place.parameter()) not in self._trained]


def _place_of(module: torch.nn.Module, name: str) -> _Place | None:
    """The place of a module's parameter by its name; None if there is none."""
    *path, last = name.split(".")
    inner: torch.nn.Module | None = module
    for part in path:
        inner = None if inner is None else inner._modules.get(part)
    if inner is None or inner._parameters.get(last) is None:
        return None
    return _Place(weakref.ref(inner), last)
