"""Whether what `load_state_dict` has loaded is of the layers that the local tensors carry, told once per plan.

A flat tensor of a wrapper says nothing about the layers in it: frozen another one of the same size instead, its
moments would be taken for another layer's, and another rank's for this one's. So `state_dict()` has the layers' names
and which pieces of them are where, and the next plan compares. A DTensor says itself whose part it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..formulas.chunk_view import COMPENSATION
from ..sharding.layout import Layer, Layout, LayoutError, listing
from ..sharding.local_tensors import held_alike, local_part, numbers_device, placements_of
from .foreign_state import without_wrappers
from .state import layer_numbers, read_numbers

__all__ = ["LoadedState", "prove_loaded_state", "with_layer_names"]

NAMES, PIECES = "names", "pieces"
BY_POSITION = re.compile(r"[0-9]+([.][0-9]+)*")
"""Names that are given where parameters have none."""


def with_layer_names(
    state_dict: dict[str, Any], tensors: Sequence[torch.Tensor], layouts: Iterable[Layout], given: Sequence[bool]
) -> dict[str, Any]:
    """The `state_dict` with the names, shapes and pieces of the layers that flat tensors carry, beside their numbers.

    Args:
        state_dict: The optimizer's.
        tensors: Those of its groups, in order.
        layouts: The plans' so far.
        given: Whether each tensor is a parameter, which is one layer and has a name of its own in its group.
    """
    described = {id(tensor): layers for layout in layouts for tensor, layers in _layers_by_tensor(layout)}
    state = dict(state_dict["state"])
    for index, (tensor, whole) in enumerate(zip(tensors, given, strict=True)):
        if not whole and state.get(index) and id(tensor) in described:
            of_layers = {**state[index].get("layers", {}), **described[id(tensor)]}
            state[index] = {**state[index], "layers": of_layers}
    return {**state_dict, "state": state}


class LoadedState:
    """What is to be known later of a state as it was loaded: the layers' steps, and whose parts it has.

    The program may have set other steps since, e.g. to count a second phase from 0 with the moments of the first.

    Args:
        optimizer: Which has loaded it.
        state_dict: What was loaded.
    """

    def __init__(self, optimizer: Any, state_dict: dict[str, Any]):
        tensors = [
            tensor for group in optimizer.param_groups for tensor in group["params"] if tensor in optimizer.state
        ]
        self._states = {id(tensor): _only_steps(optimizer.state[tensor]) for tensor in tensors}
        self._misplaced = {id(tensor) for tensor in _misplaced_tensors(optimizer, state_dict)}

    def is_misplaced(self, tensor: torch.Tensor) -> bool:
        """Whether it had another rank's part of a DTensor."""
        return id(tensor) in self._misplaced

    def steps(self, tensor: torch.Tensor, layers: int) -> torch.Tensor:
        """Those of the layers that a local tensor carries, shape (layers,), fp64; zeros where none were loaded."""
        numbers = read_numbers(self._states.get(id(tensor), {}), "step", layers, numbers_device(tensor.device))
        return numbers.to(torch.float64).expand(layers)


def _only_steps(state: dict[str, Any]) -> dict[str, Any]:
    steps = {"step": _copied(state["step"])} if "step" in state else {}
    of_layers = state.get("layers", {})
    return {**steps, "layers": {"step": _copied(of_layers["step"])}} if "step" in of_layers else steps


def _copied(number: Any) -> Any:
    return number.clone() if isinstance(number, torch.Tensor) else number


def _misplaced_tensors(optimizer: Any, state_dict: dict[str, Any]) -> list[torch.Tensor]:
    """The optimizer's tensors for which the `state_dict` has another rank's part of a DTensor."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    states = [state_dict["state"].get(index) or {} for index in saved]
    names = (*optimizer.element_state, *([COMPENSATION] if optimizer.keeps_own_state else []))
    return [
        tensor
        for tensor, state in zip(tensors, states, strict=True)
        if not all(held_alike(state[what], tensor) for what in names if what in state)
    ]


def prove_loaded_state(optimizer: Any, layout: Layout, loaded: LoadedState) -> None:
    """Compare names and pieces that the state has with the layout's, and see that moments and steps go together.

    Args:
        optimizer: Whose state it is.
        layout: The new plan's.
        loaded: What is known of the load.

    Raises:
        LayoutError: On all ranks that share a layer, if the state of any is of other layers or other parts of them, or
            a layer has step 0 and moments that are not zero, whose bias correction would be that of a first step.
    """
    _refuse_other_layers(optimizer, layout, loaded)
    for tensor in layout.tensors:
        state = optimizer.state.get(tensor, {})
        for what in (NAMES, PIECES):
            state.get("layers", {}).pop(what, None)
        if state.get("layers") == {}:
            del state["layers"]
    if "step" in optimizer.layer_state:
        _refuse_warm_layers_at_step_zero(optimizer, layout, loaded)


def _refuse_other_layers(optimizer: Any, layout: Layout, loaded: LoadedState) -> None:
    different: list[str] = []
    other_layers, other_parts = [0.0] * len(layout.layers), [0.0] * len(layout.layers)
    first = 0
    for tensor, here in _layers_by_tensor(layout):
        saved = {**here, **optimizer.state.get(tensor, {}).get("layers", {})}
        begin, first = first, first + len(here[NAMES])
        of_tensor = [*_differences(saved[NAMES], here[NAMES])]
        if of_tensor:
            different += of_tensor
            other_layers[begin:first] = [1.0] * (first - begin)
        elif loaded.is_misplaced(tensor):
            other_parts[begin:first] = [1.0] * (first - begin)
        elif PIECES in here:
            pairs = zip(saved[PIECES], here[PIECES], strict=True)
            other_parts[begin:first] = [float(theirs != ours) for theirs, ours in pairs]
    # A rank whose own state is right must not go on to wait for the others.
    somewhere = layout.reduce(torch.tensor([other_layers, other_parts], dtype=torch.float64, device="cpu")).tolist()
    layers, parts = ([layer.name for layer, n in zip(layout.layers, row, strict=True) if n] for row in somewhere)
    if layers:
        raise LayoutError(
            f"the loaded state is of other layers than {layout.backend} has: {listing(different or layers)}. Freeze "
            "and thaw the same ones, or use save_optimizer_state and load_optimizer_state(..., strict=False) of "
            "trustratio.integrations.checkpoints, which go by name"
        )
    if parts:
        raise LayoutError(
            f"the loaded state has, on some ranks, other parts of the layers than {layout.backend} keeps there: "
            f"{listing(parts)}. Save and load each rank's own state_dict() under the same settings of the wrapper, or "
            "use save_optimizer_state and load_optimizer_state of trustratio.integrations.checkpoints, which go by name"
        )


def _layers_by_tensor(layout: Layout) -> Iterator[tuple[torch.Tensor, dict[str, list[Any]]]]:
    """Of each local tensor the layers' names and, of a flat one, start, offset and length of the pieces of each."""
    names: list[list[str]] = [[] for _ in layout.tensors]
    pieces: list[list[int]] = [[] for _ in layout.layers]
    for shard in layout.shards:
        pieces[shard.layer] += [shard.start, shard.offset, shard.length]
    of_tensors: list[list[list[int]]] = [[] for _ in layout.tensors]
    for layer, of_layer in zip(layout.layers, pieces, strict=True):
        names[layer.tensor].append(_name(layer))
        of_tensors[layer.tensor].append(of_layer)
    for tensor, its_names, its_pieces in zip(layout.tensors, names, of_tensors, strict=True):
        # State of DTensors may go to any number of ranks.
        yield tensor, {NAMES: its_names} | ({PIECES: its_pieces} if placements_of(tensor) is None else {})


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


def _refuse_warm_layers_at_step_zero(optimizer: Any, layout: Layout, loaded: LoadedState) -> None:
    counts = [0] * len(layout.tensors)
    for layer in layout.layers:
        counts[layer.tensor] += 1
    pairs = [*zip(layout.tensors, counts, strict=True)]
    if not pairs:
        return
    # Layers are in the order of their tensors.
    now = torch.cat([layer_numbers(optimizer, tensor, "step", count) for tensor, count in pairs])
    at_load = torch.cat([loaded.steps(tensor, count) for tensor, count in pairs])
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
