"""What stays the same from step to step."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..formulas.rows import Rows
from ..sharding.abandoned_parameters import MissingGradients
from ..sharding.layout import Layout, LayoutError
from ..sharding.local_tensors import cut_of
from .state import read_numbers, state_dtype, write_numbers

__all__ = ["Plan"]


@dataclass
class Plan:
    """What stays the same from step to step for one set of local tensors."""

    layout: Layout
    group_layers: dict[int, range]  # group index -> its layers
    group_tensors: dict[int, list[int]]  # group index -> its local tensors
    tensor_layers: list[range]  # local tensor -> the layers it carries
    cuts: list[Any]  # how the tensors of the call, those without elements too, were cut
    missing_gradients: MissingGradients
    rows: dict[int, Rows] = field(default_factory=dict)  # group index -> its rows, where the optimizer measures them
    cache: dict[Any, Any] = field(default_factory=dict)
    has_stepped: bool = False  # whether any of its steps has found a gradient

    @classmethod
    def of(cls, layout: Layout, tensors: Sequence[torch.Tensor]) -> Plan:
        carried: list[list[int]] = [[] for _ in layout.tensors]
        for index, layer in enumerate(layout.layers):
            carried[layer.tensor].append(index)
        group_layers: dict[int, list[int]] = {}
        group_tensors: dict[int, list[int]] = {}
        for tensor, (group, layers) in enumerate(zip(layout.groups, carried, strict=True)):
            group_layers.setdefault(group, []).extend(layers)
            group_tensors.setdefault(group, []).append(tensor)
        return cls(
            layout=layout,
            group_layers={group: _as_range(layers) for group, layers in group_layers.items()},
            group_tensors=group_tensors,
            tensor_layers=[_as_range(layers) for layers in carried],
            cuts=[cut_of(tensor) for tensor in tensors],
            missing_gradients=MissingGradients(len(tensors)),
        )

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the tensors, the same ones, are still cut as they were."""
        return all(map(operator.eq, map(cut_of, tensors), self.cuts))

    def share_layer_state(self, names: Sequence[str], states: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        """Give ranks that hold nothing of a layer its per-layer state, which a wrapper may not have loaded there."""
        if not (names and self.layout.reductions):
            return
        device = self.layout.device
        states_here = [states[tensor] for tensor in self.layout.tensors]
        for name in names:
            # The mean over the ranks that know a layer's number: a sum of those, and one of how many they are.
            known = [name in state or name in state.get("layers", {}) for state in states_here]
            values = [
                read_numbers(state, name, count, device).to(torch.float64).expand(count)
                for state, count in zip(states_here, self.layer_counts, strict=True)
            ]
            mask = torch.cat([torch.full_like(v, there) for v, there in zip(values, known, strict=True)])
            total, ranks = self.layout.reduce(torch.stack([torch.cat(values) * mask, mask]))
            shared = (total / ranks.clamp(min=1)).split(self.layer_counts)
            for state, there, of_tensor, tensor in zip(states_here, known, shared, self.layout.tensors, strict=True):
                if not there and len(of_tensor):
                    write_numbers(state, name, of_tensor.to(state_dtype(tensor, name)))

    @functools.cached_property
    def layer_counts(self) -> list[int]:
        """How many layers each local tensor carries."""
        return [len(layers) for layers in self.tensor_layers]

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of all layers, those of the first group first."""
        return [self.layout.layers[index].name for layers in self.group_layers.values() for index in layers]


def _as_range(indices: list[int]) -> range:
    covered = range(indices[0], indices[-1] + 1) if indices else range(0)
    if list(covered) != indices:
        raise LayoutError(f"layers must follow the order of their tensors, got layers {indices} in one tensor")
    return covered
