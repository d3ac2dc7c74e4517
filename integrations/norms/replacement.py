"""A warning where the optimizer that is to be measured is not the one that trains its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod, WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from trustratio.optimizers.sharding.backends import copied_parameters
from trustratio.optimizers.sharding.layout import LayoutError
from trustratio.optimizers.sharding.observed import ObservedOptimizer
from trustratio.optimizers.stepping.taking_part import taking_part

from .chain import innermost_optimizers, stepped_by

__all__ = ["ReplacementWatch"]


class ReplacementWatch:
    """Looks at the first step of every other optimizer, until it is removed: when one that is measured has stepped.

    Args:
        optimizers: Those that are measured.
        observe: Makes of an optimizer what backends are asked about.
        are_under_way: Whether one of those is within its step, of which other optimizers' steps may be parts.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        observe: Callable[[torch.optim.Optimizer], ObservedOptimizer],
        are_under_way: Callable[[], bool],
    ):
        self._are_under_way = are_under_way
        self._measured: WeakSet[torch.optim.Optimizer] = WeakSet(optimizers)
        self._observe = observe
        self._seen: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._parameters = WeakIdKeyDictionary(
            {tensor: None for one in optimizers for group in one.param_groups for tensor in group["params"]}
        )
        self._handle = register_optimizer_step_pre_hook(torch.compiler.disable(_weakly(self._look)))

    def remove(self) -> None:
        """Look no more."""
        self._handle.remove()

    def _look(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self._measured and optimizer not in self._seen:
            self._seen.add(optimizer)
            inside = [one for one in innermost_optimizers(optimizer) if one in self._measured]
            if inside and stepped_by(optimizer, "LayerNorms")[0].optimizer is optimizer:
                self._warn_of_wrapper(type(optimizer).__name__, type(inside[0]).__name__)
            elif not inside and not self._are_under_way() and self._steps(optimizer):
                self._warn(type(optimizer).__name__)

    def _warn_of_wrapper(self, wrapper: str, inside: str) -> None:
        warnings.warn(
            f"LayerNorms measures the steps of {inside}, which {wrapper} takes: if that moves the weights besides, "
            f"give LayerNorms the {wrapper}",
            stacklevel=5,
        )

    def _warn(self, stepped: str) -> None:
        given = " and ".join(type(one).__name__ for one in self._measured)
        warnings.warn(
            f"LayerNorms was given {given}, but {stepped} steps its parameters, and nothing is measured: give "
            "LayerNorms what the wrapper has returned (deepspeed.initialize, accelerator.prepare), or train with your "
            'own optimizer: leave the "optimizer" section out of the DeepSpeed config, and set '
            '"zero_force_ds_cpu_optimizer" to false in it',
            stacklevel=5,
        )

    def _steps(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether another optimizer steps any parameters of those that are measured, or what a wrapper made of them."""
        observed = self._observe(optimizer)
        _, tensors = taking_part(optimizer.param_groups, observed.was_given)
        if any(tensor in self._parameters for tensor in tensors):
            return True
        if all(map(observed.was_given, tensors)):
            return False
        try:
            copied = copied_parameters(observed)
        except LayoutError:
            return False
        return any(parameter in self._parameters for parameter in copied)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that keeps nothing alive: torch has it as long as the process lives, and a model goes before."""
    reference = WeakMethod(method)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return call
