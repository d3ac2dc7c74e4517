"""Whether what `load_state_dict` has loaded is of the layers that the local tensors carry, told once per plan.

A flat tensor of a wrapper says nothing about the layers in it: frozen another one of the same size instead, its
moments would be taken for another layer's. So `state_dict()` has their names, and the next plan compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..sharding.layout import Layer, Layout, LayoutError, listing
from ..sharding.local_tensors import local_part, numbers_device
from .foreign_state import without_wrappers
from .state import layer_numbers, read_numbers

__all__ = ["LoadedSteps", "prove_loaded_state", "with_layer_names"]

NAMES = "names"
BY_POSITION = re.compile(r"[0-9]+([.][0-9]+)*")
"""Names that are given where parameters have none."""


def with_layer_names(
    state_dict: dict[str, Any], tensors: Sequence[torch.Tensor], layouts: Iterable[Layout], given: Sequence[bool]
) -> dict[str, Any]:
    """The `state_dict` with the names and shapes of the layers that flat tensors carry, beside their numbers.

    Args:
        state_dict: The optimizer's.
        tensors: Those of its groups, in order.
        layouts: The plans' so far.
        given: Whether each tensor is a parameter, which is one layer and has a name of its own in its group.
    """
    described = {id(tensor): names for layout in layouts for tensor, names in _names_by_tensor(layout)}
    state = dict(state_dict["state"])
    for index, (tensor, whole) in enumerate(zip(tensors, given, strict=True)):
        if not whole and index in state and id(tensor) in described:
            of_layers = {**state[index].get("layers", {}), NAMES: described[id(tensor)]}
            state[index] = {**state[index], "layers": of_layers}
    return {**state_dict, "state": state}


class LoadedSteps:
    """The layers' steps as a state was loaded.

    The program may have set others since, e.g. to count a second phase from 0 with the moments of the first.
    """

    def __init__(self, optimizer: Any):
        tensors = [
            tensor for group in optimizer.param_groups for tensor in group["params"] if tensor in optimizer.state
        ]
        self._states = {id(tensor): _only_steps(optimizer.state[tensor]) for tensor in tensors}

    def of(self, tensor: torch.Tensor, layers: int) -> torch.Tensor:
        """Those of the layers that a local tensor carries, shape (layers,), fp64; zeros where none were loaded."""
        numbers = read_numbers(self._states.get(id(tensor), {}), "step", layers, numbers_device(tensor.device))
        return numbers.to(torch.float64).expand(layers)


def _only_steps(state: dict[str, Any]) -> dict[str, Any]:
    steps = {name: torch.as_tensor(state[name]).clone() for name in ("step",) if name in state}
    of_layers = {name: numbers.clone() for name, numbers in state.get("layers", {}).items() if name == "step"}
    return {**steps, "layers": of_layers} if of_layers else steps


def prove_loaded_state(optimizer: Any, layout: Layout, loaded: LoadedSteps) -> None:
    """Compare the names that the state has with the layout's, and see that moments and steps go together.

    Args:
        optimizer: The optimizer.
        layout: Of its new plan.
        loaded: The steps that were loaded.

    Raises:
        LayoutError: On all ranks that share a layer, if the state is of other layers, or a layer has step 0 and moments
            that are not zero, whose bias correction would be that of a first step.
    """
    for tensor, names in _names_by_tensor(layout):
        state = optimizer.state.get(tensor, {})
        different = [*_differences(state.get("layers", {}).pop(NAMES, names), names)]
        if state.get("layers") == {}:
            del state["layers"]
        if different:
            raise LayoutError(
                f"the loaded state is of other layers than {layout.backend} has: {listing(different)}. Freeze and thaw "
                "the same ones, or use save_optimizer_state and load_optimizer_state(..., strict=False) of "
                "trustratio.integrations.checkpoints, which go by name"
            )
    if "step" in optimizer.layer_state:
        _refuse_warm_layers_at_step_zero(optimizer, layout, loaded)


def _names_by_tensor(layout: Layout) -> Iterator[tuple[torch.Tensor, list[str]]]:
    of_tensors: list[list[str]] = [[] for _ in layout.tensors]
    for layer in layout.layers:
        of_tensors[layer.tensor].append(_name(layer))
    return zip(layout.tensors, of_tensors, strict=True)


def _name(layer: Layer) -> str:
    return f"{without_wrappers(layer.name)} {tuple(layer.shape)}"


def _differences(saved: list[str], found: list[str]) -> Iterator[str]:
    if len(saved) != len(found):
        yield f"{len(saved)} in the state and {len(found)} here"
    for theirs, ours in zip(saved, found, strict=False):
        pairs = [entry.partition(" ") for entry in (theirs, ours)]
        by_position = any(BY_POSITION.fullmatch(name) for name, _, _ in pairs)
        if theirs != ours and not (by_position and pairs[0][2] == pairs[1][2]):
            yield f"{theirs} in the state is {ours} here"


def _refuse_warm_layers_at_step_zero(optimizer: Any, layout: Layout, loaded: LoadedSteps) -> None:
    counts = [0] * len(layout.tensors)
    for layer in layout.layers:
        counts[layer.tensor] += 1
    pairs = [*zip(layout.tensors, counts, strict=True)]
    if not pairs:
        return
    # Layers are in the order of their tensors.
    now = torch.cat([layer_numbers(optimizer, tensor, "step", count) for tensor, count in pairs])
    at_load = torch.cat([loaded.of(tensor, count) for tensor, count in pairs])
    warm, counted = layout.reduce(torch.stack([_warm_shards(optimizer, layout), at_load]))
    cold = (now == 0) & (counted == 0) & (warm > 0)
    names = [layer.name for layer, wrong in zip(layout.layers, cold.tolist(), strict=True) if wrong]
    if names:
        raise LayoutError(
            f"the loaded state has step 0, and moments that are not zero, of {listing(names)}: its steps were lost on "
            "the way. Load a complete state; save_optimizer_state of trustratio.integrations.checkpoints has one. If "
            "steps are to be counted anew, set them after loading"
        )


def _warm_shards(optimizer: Any, layout: Layout) -> torch.Tensor:
    """How many of this rank's shards of each layer have moments that are not zero, shape (layers,)."""
    warm = torch.zeros(len(layout.layers), dtype=torch.float64, device=layout.numbers_device)
    for shard in layout.shards:
        state = optimizer.state.get(layout.tensors[layout.layers[shard.layer].tensor], {})
        for what in optimizer.element_state:
            if what in state:
                run = local_part(state[what]).reshape(-1).narrow(0, shard.start, shard.length)
                warm[shard.layer] += run.any().to(warm.device)
    return warm
