"""Any torch optimizer in the words in which backends are asked, so that they explain what it is stepped with.

A `LayerwiseOptimizer` answers for itself. Of another one somebody must say which tensors are the model's own
parameters: what a wrapper put in their place looks the same from inside the optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["ObservedOptimizer", "held_by_wrappers", "innermost"]

INSIDE = ("chained_optimizers", "optimizer", "optim")
"""By which wrappers call what they step: Megatron's chain; accelerate, DeepSpeed, Lightning and Megatron; torch."""


class ObservedOptimizer:
    """What backends want to know of an optimizer, for one that is not a `LayerwiseOptimizer`.

    It has no statistics of group gradients, measures no rows and keeps no numbers of layers. `resolve_layout` takes it.

    Args:
        optimizer: The one that is stepped with the local tensors, the innermost of its wrappers.
        named_parameters: The model's own parameters, wrapped or not, with their layers' names, None where one
            has none. No other tensor passes for a whole layer.
    """

    statistics = None
    data_parallel_group: dist.ProcessGroup | None = None
    layer_state: tuple[str, ...] = ()
    element_state: tuple[str, ...] = ()

    def __init__(self, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str | None, torch.Tensor]]):
        self.observed = optimizer
        self._names = WeakIdKeyDictionary({parameter: name for name, parameter in named_parameters})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own, which wrappers change."""
        groups: list[dict[str, Any]] = self.observed.param_groups
        return groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The optimizer's own."""
        state: defaultdict[torch.Tensor, Any] = self.observed.state
        return state

    def was_given(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a parameter of the model."""
        return tensor in self._names

    def parameter_name(self, parameter: torch.Tensor) -> str | None:
        """The layer's name, None of other tensors."""
        name: str | None = self._names.get(parameter)
        return name

    def has_rows(self, group: dict[str, Any]) -> bool:
        """No."""
        return False


def held_by_wrappers(optimizer: Any) -> Any:
    """The object that a wrapper has a reference to: the optimizer that asks, or the one that it observes."""
    return optimizer.observed if isinstance(optimizer, ObservedOptimizer) else optimizer


def innermost(optimizer: Any) -> Any:
    """What is in all wrappers of an optimizer, whatever it is: of a chain of several, the chain."""
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        inside = next((inner for name in INSIDE if (inner := getattr(optimizer, name, None)) is not None), None)
        chain = list(inside) if isinstance(inside, (list, tuple)) else [inside]
        optimizer = chain[0] if len(chain) == 1 and chain[0] is not None else optimizer
    return optimizer
