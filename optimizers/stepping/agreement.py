"""Whether ranks that train the same layers have taken the same step: asked once for every plan, after its first step.

Where gradients are not averaged, or weights, state or options differ between ranks, every rank goes on with numbers of
its own, and nothing in its own step tells. So the ranks compare their trust ratios, and beside them the norms of the
gradients, on which LAMB's first ratios hardly depend, and the options. Numbers are rounded to fp32, as the update takes
them: sums of the same numbers do not depend on threads, but their last fp64 bits may depend on the processor.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..sharding.backends import find_data_parallel
from ..sharding.data_parallel import ddp_ranks
from ..sharding.differences import digest
from ..sharding.layout import Layer, Layout, LayoutError, listing
from ..sharding.living import living
from ..sharding.local_tensors import reduction_device
from ..sharding.observed import ObservedOptimizer

__all__ = ["GRADIENT", "Agreement"]

STEPS = 2
"""How often ranks compare at most: a second time if no layer had a gradient at first, as when a wrapper makes state."""
ROUNDING = 1e-5
"""Smaller relative differences are rounding, and so are those below the resolution of the gradient's dtype."""
RATIO, GRADIENT = "trust ratio", "norm of the gradient"
POSITION = re.compile(r"\d+\.\d+(\[\d+\])?")
"""The name of a layer that was given none."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of an option that is a function: another one on every rank."""

Quantities = dict[str, Any]
"""What ranks compare of a layer: its ratio and the norm of its gradient as numbers, and options as texts."""


@dataclass(frozen=True)
class _Difference:
    """A layer of which ranks have different numbers."""

    described: str
    is_rounding: bool


class Agreement:
    """The comparison of one plan's first step; `steps_left` says in how many steps it is still to be made."""

    def __init__(self) -> None:
        self.steps_left = STEPS

    def check(self, optimizer: Any, layout: Layout, ratios: torch.Tensor, gradient_squares: torch.Tensor) -> None:
        """Compare with all ranks that share layers: one small all-reduce for each process group. Waits for the device.

        Args:
            optimizer: The optimizer.
            layout: Of the step; on a rank without tensors too.
            ratios: Of the layout's layers, shape (layers,), fp64.
            gradient_squares: Squared norms of their gradients, likewise.

        Raises:
            LayoutError: On all ranks of a process group, if its ranks differ by more than rounding.
        """
        self.compare(optimizer, layout, {RATIO: ratios, GRADIENT: gradient_squares.sqrt()}, cut_too=True)

    def compare(
        self, optimizer: Any, layout: Layout, numbers: Mapping[str, torch.Tensor], *, cut_too: bool = False
    ) -> None:
        """The same for any optimizer, and numbers of layers by what they are, shape (layers,), `GRADIENT` among them.

        Ranks over which a layer is cut have the same sums of it, and are asked about it only if `cut_too`.
        """
        sharing = _sharing(optimizer, layout, cut_too)
        groups = [(group, names) for group, names in sharing if dist.get_world_size(group) > 1]
        self.steps_left = self.steps_left - 1 if groups else 0
        if not groups:
            return
        quantities = _quantities(optimizer, layout, numbers)
        differences: list[_Difference] = []
        for process_group, names in groups:
            of_layers = {name: quantities[index] for index, name in names.items()}
            same, any_gradient = _compare(process_group, of_layers)
            if any_gradient:
                self.steps_left = 0
            if not same:
                tolerances = {name: _tolerance(layout.layers[index]) for index, name in names.items()}
                differences += _differences(process_group, of_layers, tolerances)
        _tell([d.described for d in differences if not d.is_rounding], [d.described for d in differences])


def _tell(beyond_rounding: Sequence[str], different: Sequence[str]) -> None:
    if beyond_rounding:
        raise LayoutError(
            "ranks that train the same layers have taken different steps, so that their weights drift apart: "
            f"{listing(beyond_rounding, shown=3)}. Average the gradients of all these ranks before step() (under "
            "DistributedDataParallel, let the last backward run outside no_sync()), and give all of them the same "
            "weights, state and options. Layers that each rank has of its own say so: parameter.allreduce = False"
        )
    if different:
        warnings.warn(
            f"ranks that train the same layers differ by rounding: {listing(different, shown=3)}. Other processors, "
            "devices or library versions add up in another order; by that replicas drift apart slowly, whatever the "
            "optimizer",
            stacklevel=5,
        )


# Who shares layers --------------------------------------------------------------------------------------------------


def _sharing(optimizer: Any, layout: Layout, cut_too: bool) -> Iterator[tuple[dist.ProcessGroup, Mapping[int, str]]]:
    """The process groups whose ranks have the same layers, or parts of them, as far as anybody knows.

    Each with these layers' indices, and names that are the same on all ranks.
    """
    # A group may cut some layers and repeat others.
    by_ranks: dict[tuple[int, ...], tuple[dist.ProcessGroup, dict[int, str]]] = {}
    for process_group, layers in (*(layout.reductions if cut_too else ()), *layout.replicas):
        ranks = tuple(dist.get_process_group_ranks(process_group))
        names_there = by_ranks.setdefault(ranks, (process_group, {}))[1]
        names_there.update({index: layout.layers[index].name for index in layers})
    yield from by_ranks.values()
    covered = {index for _, layers in (*layout.reductions, *layout.replicas) for index in layers}
    if layout.others is not None or (layout.layers and len(covered) == len(layout.layers)):
        return
    data_parallel = _data_parallel(optimizer)
    names = _names(optimizer, layout) if data_parallel else {}
    for process_group in data_parallel:
        yield process_group, names


def _data_parallel(optimizer: Any) -> list[dist.ProcessGroup]:
    """The ranks that average gradients.

    None where nobody knows, which is an error only for who needs to know, and none where some may have no samples left
    to take a step with.
    """
    try:
        found = find_data_parallel(optimizer)
    except LayoutError:
        return []
    if found is None and isinstance(optimizer, ObservedOptimizer):
        found = ddp_ranks(optimizer, ignored_too=True)
    groups = () if found is None or found.joins() else (found.process_group, found.replicas)
    return [group for group in groups if group is not None]


def _names(optimizer: Any, layout: Layout) -> dict[int, str]:
    """Of layers that are whole: names by which ranks know that they have the same one, where there are such names.

    Programs may share layers out among ranks by hand. So a layer that was given no name is not known by its place among
    this rank's, but by its name in the model.
    """
    # Experts need not be the same ones on all ranks.
    common = {i: layer for i, layer in enumerate(layout.layers) if getattr(layer.parameter, "allreduce", True)}
    nameless = {i: layer for i, layer in common.items() if POSITION.fullmatch(layer.name)}
    in_model = _names_in_models({id(layer.parameter) for layer in nameless.values()}) if nameless else {}
    names = {}
    for index, layer in common.items():
        if index not in nameless:
            names[index] = layer.name
        elif id(layer.parameter) in in_model:
            _, bracket, segment = layer.name.partition("[")
            names[index] = in_model[id(layer.parameter)] + bracket + segment
    return names


def _names_in_models(wanted: set[int]) -> dict[int, str]:
    """Names by the ids of parameters, each in the module that contains the most."""
    names: dict[int, str] = {}
    for module in living(torch.nn.Module):
        if "_modules" in vars(module):  # it is not under construction
            for name, parameter in module.named_parameters():
                if id(parameter) in wanted and len(name) > len(names.get(id(parameter), "")):
                    names[id(parameter)] = name
    return names


# What they have -----------------------------------------------------------------------------------------------------


def _quantities(optimizer: Any, layout: Layout, numbers: Mapping[str, torch.Tensor]) -> list[Quantities]:
    """Of each layer of the layout."""
    defaults = getattr(optimizer, "defaults", ())  # an observed one has none
    options = [
        {name: _plain(group[name]) for name in defaults if name in group}
        for group in optimizer.param_groups
        if defaults
    ]
    rounded = torch.stack(list(numbers.values())).to(torch.float32).T.tolist()
    return [
        {**dict(zip(numbers, of_layer, strict=True)), **(options[layout.groups[layer.tensor]] if options else {})}
        for layer, of_layer in zip(layout.layers, rounded, strict=True)
    ]


def _plain(option: Any) -> str:
    return ADDRESS.sub("", repr(option.tolist() if isinstance(option, torch.Tensor) else option))


def _tolerance(layer: Layer) -> float:
    return max(ROUNDING, layer.gradient_resolution)


def _compare(process_group: dist.ProcessGroup, of_layers: Mapping[str, Quantities]) -> tuple[bool, bool]:
    """Whether all ranks have the same, and whether any has a gradient: one all-reduce of three numbers.

    Its size does not depend on the layers, so that ranks with others, or with none, do not hang.
    """
    said = digest(repr(of_layers))
    any_gradient = int(any(quantities[GRADIENT] != 0 for quantities in of_layers.values()))  # NaN counts
    mine = torch.tensor([said, -said, any_gradient], dtype=torch.int64, device="cpu")
    largest = mine.to(reduction_device(process_group, mine.device))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    highest, lowest, somewhere = largest.tolist()
    return highest == -lowest, bool(somewhere)


def _differences(
    process_group: dist.ProcessGroup, of_layers: Mapping[str, Quantities], tolerances: Mapping[str, float]
) -> Iterator[_Difference]:
    """Layers of which ranks have different numbers, who has which, the same on all ranks of the group."""
    of_ranks: list[Any] = [None] * dist.get_world_size(process_group)
    mine = {name: (quantities, tolerances[name]) for name, quantities in of_layers.items()}
    dist.all_gather_object(of_ranks, mine, group=process_group)
    ranks = dist.get_process_group_ranks(process_group)
    for name in dict.fromkeys(name for layers in of_ranks for name in layers):
        held = {rank: layers[name][0] for rank, layers in zip(ranks, of_ranks, strict=True) if name in layers}
        tolerance = next(layers[name][1] for layers in of_ranks if name in layers)
        parts, is_rounding = [], True
        for what in next(iter(held.values())):
            ranks_with: defaultdict[Any, list[str]] = defaultdict(list)
            for rank, quantities in held.items():
                value = quantities[what]
                ranks_with["nan" if value != value else value].append(str(rank))
            if len(ranks_with) > 1:
                values = (f"{value} on {_listing_of(having)}" for value, having in ranks_with.items())
                parts.append(f"{what} {', '.join(values)}")
                is_rounding &= _are_near(list(ranks_with), tolerance)
        if parts:
            yield _Difference(f"{name}: {'; '.join(parts)}", is_rounding)


def _listing_of(ranks: Sequence[str]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks[:4])}{', ...' * (len(ranks) > 4)}"


def _are_near(values: Sequence[Any], tolerance: float) -> bool:
    """Whether all are numbers that differ by rounding."""
    if any(isinstance(value, str) for value in values):
        return False
    return bool(max(values) - min(values) <= tolerance * max(map(abs, values)))
