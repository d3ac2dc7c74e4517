"""What stays the same from step to step."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..formulas.layer_table import adapts
from ..formulas.rows import Rows
from ..options.common import STORAGE_OPTIONS
from ..sharding.abandoned_parameters import Places
from ..sharding.layout import Layout, LayoutError
from ..sharding.local_tensors import cut_of
from .agreement import Agreement
from .joint_groups import JointGroups, first_of_joined
from .state import number_dtype, read_numbers, write_numbers
from .storage import Storage
from .storage_order import goes_as_it_lies

__all__ = ["Plan", "options_of_plan"]


@dataclass
class Plan:
    """What stays the same from step to step for one set of local tensors.

    Groups that are stepped together go by the index of the first of them, in `joint_layout` and in the dicts.
    """

    layout: Layout
    joint_layout: Layout  # the same, where the groups that are stepped together are one
    joint_groups: dict[int, JointGroups]  # group index -> the groups that are stepped together, if several
    tensors: tuple[torch.Tensor, ...]  # of the call, those without elements too
    cuts: list[Any]  # how these were cut
    options: Any  # what `options_of_plan` has returned
    group_layers: dict[int, range]  # group index -> its layers
    group_tensors: dict[int, list[int]]  # group index -> its local tensors
    tensor_layers: list[range]  # local tensor -> the layers it carries
    storage: Storage  # in how many bits what is kept
    adapted: dict[int, list[bool]]  # group index -> for each of its layers, whether the ratio scales it
    as_they_lie: frozenset[int]  # local tensors whose elements are gone over in the order of memory
    agreement: Agreement = field(default_factory=Agreement)
    places: Places = field(default_factory=Places)
    rows: dict[int, Rows] = field(default_factory=dict)  # group index -> its rows, where the optimizer measures them
    cache: dict[Any, Any] = field(default_factory=dict)
    has_stepped: bool = False  # whether any of its steps has found a gradient

    @classmethod
    def of(
        cls, algorithm: Algorithm, layout: Layout, tensors: Sequence[torch.Tensor], groups: Sequence[int] | None = None
    ) -> Plan:
        carried: list[list[int]] = [[] for _ in layout.tensors]
        for index, layer in enumerate(layout.layers):
            carried[layer.tensor].append(index)
        group_layers: dict[int, list[int]] = {}
        group_tensors: dict[int, list[int]] = {}
        joint_layout = _with_joint_groups(algorithm, layout)
        for tensor, (group, layers) in enumerate(zip(joint_layout.groups, carried, strict=True)):
            group_layers.setdefault(group, []).extend(layers)
            group_tensors.setdefault(group, []).append(tensor)
        storage = Storage(algorithm, joint_layout)
        option = [algorithm.param_groups[layout.groups[layer.tensor]]["adapt"] for layer in layout.layers]
        plan = cls(
            layout=layout,
            joint_layout=joint_layout,
            joint_groups=_joint_groups(layout, joint_layout),
            tensors=tuple(tensors),
            cuts=[cut_of(tensor) for tensor in tensors],
            options=options_of_plan(algorithm, layout.groups if groups is None else groups),
            group_layers={group: _as_range(layers) for group, layers in group_layers.items()},
            group_tensors=group_tensors,
            as_they_lie=frozenset(i for i in goes_as_it_lies(algorithm, layout) if not storage.rounds[i]),
            storage=storage,
            tensor_layers=[_as_range(layers) for layers in carried],
            adapted={
                group: [adapts(layout.layers[layer], option[layer]) for layer in layers]
                for group, layers in group_layers.items()
            },
        )
        plan._refuse_state_of_other_segments(algorithm)
        with_rows = [group for group in plan.group_layers if algorithm.has_rows(algorithm.param_groups[group])]
        plan.rows = {group: Rows(layout, plan.group_layers[group]) for group in with_rows}
        return plan

    def fits(self, tensors: Sequence[torch.Tensor], options: Any) -> bool:
        """Whether the tensors, the same ones, are still cut as they were, and the options still ask for this plan."""
        return self.options == options and all(map(operator.eq, map(cut_of, tensors), self.cuts))

    def _refuse_state_of_other_segments(self, algorithm: Algorithm) -> None:
        """Raise LayoutError if there are numbers of layers that the option `segments` has cut in another way since."""
        for tensor, layers in zip(self.layout.tensors, self.tensor_layers, strict=True):
            state = algorithm.state.get(tensor, {})
            for name in algorithm.layer_state:
                kept = state.get("layers", {}).get(name, state.get(name))
                count = kept.numel() if isinstance(kept, torch.Tensor) else len(layers)
                # The number of updates is the same for all parts of a layer; others are sums over its elements.
                if count != len(layers) and not (count == 1 and name == "step"):
                    raise LayoutError(
                        f"the state {name} of {self.layout.layers[layers.start].name} is of {count} layers, and "
                        f"segments makes {len(layers)} of the same parameter: set segments before the first step, and "
                        "load state that was saved with the same segments"
                    )

    def share_layer_state(self, names: Sequence[str], states: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        """Give ranks that hold nothing of a layer its per-layer state, which a wrapper may not have loaded there."""
        if not (names and self.layout.reductions):
            return
        device = self.layout.numbers_device
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
                    write_numbers(state, name, of_tensor.to(number_dtype(tensor, name)))

    @functools.cached_property
    def has_16_bit_weights(self) -> bool:
        """Whether any local tensor is of 16 bits, so that what a step adds to it may be lost."""
        return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in self.layout.tensors)

    @functools.cached_property
    def layer_counts(self) -> list[int]:
        """How many layers each local tensor carries."""
        return [len(layers) for layers in self.tensor_layers]

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of all layers, those of the first group first."""
        return [self.layout.layers[index].name for layers in self.group_layers.values() for index in layers]

    @property
    def adapted_layers(self) -> list[str]:
        """The names of the layers that the ratio scales."""
        adapted = [scaled for of_group in self.adapted.values() for scaled in of_group]
        return [name for name, scaled in zip(self.names, adapted, strict=True) if scaled]


def options_of_plan(algorithm: Algorithm, groups: Sequence[int]) -> tuple[Any, ...]:
    """What a plan depends on besides its tensors, for comparison: which group each is in, which groups are stepped
    together, and options of the groups.

    Asked at every step, so it compares what is there and waits for nothing.
    """
    names = (*algorithm.plan_options, *STORAGE_OPTIONS)
    of_groups = [
        tuple(_unchanging(group.get(name)) for name in names) for group in algorithm.param_groups if group["params"]
    ]
    return tuple(groups), first_of_joined(algorithm), algorithm.statistics is None, *of_groups


def _with_joint_groups(algorithm: Algorithm, layout: Layout) -> Layout:
    """The layout, or another one whose groups that are stepped together have the index of the first of them in it."""
    indices: dict[int, int] = {}
    firsts = first_of_joined(algorithm)
    groups = tuple(indices.setdefault(firsts[group], group) for group in layout.groups)
    return layout if groups == layout.groups else replace(layout, groups=groups)


def _joint_groups(layout: Layout, joint_layout: Layout) -> dict[int, JointGroups]:
    """The groups that are stepped together, by the index of the first of them, where there are several."""
    layer_counts: dict[int, dict[int, int]] = {}
    for group, first in zip(layout.groups, joint_layout.groups, strict=True):
        layer_counts.setdefault(first, {}).setdefault(group, 0)
    for layer in layout.layers:
        layer_counts[joint_layout.groups[layer.tensor]][layout.groups[layer.tensor]] += 1
    device = layout.numbers_device
    return {first: JointGroups(counts, device) for first, counts in layer_counts.items() if len(counts) > 1}


def _unchanging(option: Any) -> Any:
    """A copy of an option that may be changed in place."""
    return tuple(option.items()) if isinstance(option, dict) else option


def _as_range(indices: list[int]) -> range:
    covered = range(indices[0], indices[-1] + 1) if indices else range(0)
    if list(covered) != indices:
        raise LayoutError(f"layers must follow the order of their tensors, got layers {indices} in one tensor")
    return covered
