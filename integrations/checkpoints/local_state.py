"""An optimizer's weights and state by layer name: what this rank holds of it, and what all ranks hold together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.layerwise import LayerwiseOptimizer
from trustratio.optimizers.sharding.backends import _backends
from trustratio.optimizers.sharding.local_tensors import local_part, reduction_device
from trustratio.optimizers.sharding.resolve import resolve_layout
from trustratio.optimizers.stepping.foreign_state import without_wrappers
from trustratio.optimizers.stepping.state import layer_numbers, make_element_state, set_layer_numbers, state_dtype

from .pieces import Piece, ReadBlock, pieces_by_layer

__all__ = [
    "WEIGHT",
    "Catalogue",
    "LocalState",
    "OptimizerStateError",
    "as_json",
    "device_for",
    "of_all_ranks",
    "prove_positions",
    "raise_together",
    "rank",
    "several_ranks",
    "share_out",
]

WEIGHT = "weight"
NOT_OPTIONS = ("params", "param_names")
POSITION_MODULUS = 1 << 40  # sums of positions are compared modulo this, so that they never overflow
SUMMED_AT_ONCE = 1 << 20


class OptimizerStateError(RuntimeError):
    """State that cannot be saved completely, or a file that does not belong to this model and optimizer."""


# Ranks --------------------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if several_ranks() else 0


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank, on every rank."""
    if not several_ranks():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(problems: list[str]) -> None:
    """Raise OptimizerStateError on every rank if any rank has a problem; all ranks must call this."""
    found = list(dict.fromkeys(problem for theirs in of_all_ranks(problems) for problem in theirs))
    if found:
        raise OptimizerStateError("\n".join(found))


def device_for(tensors_device: torch.device) -> torch.device:
    """Where collectives over all ranks work."""
    if not several_ranks():
        return tensors_device
    assert dist.group.WORLD is not None
    return reduction_device(dist.group.WORLD, tensors_device)


# This rank ----------------------------------------------------------------------------------------------------------


@dataclass
class LocalLayer:
    """One layer, as this rank sees it.

    Attributes:
        name: Unique over all ranks.
        shape: The whole layer's.
        group: Index of its parameter group.
        tensor: The local tensor that carries it.
        position: Among the layers of that tensor.
        pieces: What this rank holds of it.
        frozen: Whether it takes no part in training, so that a file may do without it.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    tensor: torch.Tensor
    position: int
    pieces: list[Piece]
    frozen: bool


class LocalState:
    """The optimizer's weights and state on this rank.

    Args:
        optimizer: An optimizer of this package, or what wraps it.
        model: Names the layers, if given.
    """

    def __init__(self, optimizer: Any, model: torch.nn.Module | None):
        self.optimizer = _unwrapped(optimizer)
        self.element_state = list(self.optimizer.element_state)
        self.layer_state = list(self.optimizer.layer_state)
        self.layout = resolve_layout(self.optimizer, _stepped_tensors(self.optimizer))
        names = {id(p): without_wrappers(name) for name, p in model.named_parameters()} if model is not None else {}
        parts = Counter(id(layer.parameter) for layer in self.layout.layers if layer.parameter is not None)
        seen: Counter[int] = Counter()  # id of a parameter -> layers so far; several if its segments are layers
        self.carried: Counter[int] = Counter()  # id of a local tensor -> number of its layers
        self.layers: list[LocalLayer] = []
        for layer, pieces in zip(self.layout.layers, pieces_by_layer(self.layout), strict=True):
            tensor = self.layout.tensors[layer.tensor]
            name = names.get(id(layer.parameter), layer.name)
            if id(layer.parameter) in names and parts[id(layer.parameter)] > 1:
                name = f"{name}[{seen[id(layer.parameter)]}]"
            seen[id(layer.parameter)] += 1
            self.layers.append(
                LocalLayer(
                    name=name,
                    shape=layer.shape,
                    group=self.layout.groups[layer.tensor],
                    tensor=tensor,
                    position=self.carried[id(tensor)],
                    pieces=pieces,
                    frozen=tensor is layer.parameter and not (tensor.requires_grad or self.optimizer.state.get(tensor)),
                )
            )
            self.carried[id(tensor)] += 1
        self.by_name = {layer.name: layer for layer in self.layers}

    @property
    def class_name(self) -> str:
        return type(self.optimizer).__name__

    def names_of_group(self, index: int) -> list[str]:
        return [layer.name for layer in self.layers if layer.group == index]

    def dtype(self, layer: LocalLayer, what: str) -> torch.dtype:
        return layer.tensor.dtype if what == WEIGHT else state_dtype(layer.tensor, what)

    def layer_numbers(self, layer: LocalLayer, what: str) -> torch.Tensor:
        """The per-layer state of all layers in the layer's tensor, fp64."""
        return layer_numbers(self.optimizer, layer.tensor, what, self.carried[id(layer.tensor)])

    def copy_to(self, rows: torch.Tensor, first: int, layer: LocalLayer, what: str) -> None:
        """Copy this rank's elements of a layer's rows from `first` on; what does not exist yet is zero."""
        if what in self.layer_state:
            rows.copy_(self.layer_numbers(layer, what)[layer.position])
            return
        whole = layer.tensor if what == WEIGHT else self.optimizer.state.get(layer.tensor, {}).get(what)
        if whole is not None:
            flat = local_part(whole).detach().reshape(-1)
            for piece in layer.pieces:
                piece.copy_to(rows, first, flat)

    def set_numbers(self, layer: LocalLayer, what: str, value: float) -> None:
        """Set one layer's per-layer state."""
        numbers = self.layer_numbers(layer, what).clone()
        numbers[layer.position] = value
        set_layer_numbers(self.optimizer, layer.tensor, what, numbers)

    def copy_from(self, read: ReadBlock, layer: LocalLayer, what: str) -> None:
        """Set this rank's elements of a layer."""
        whole = (
            layer.tensor
            if what == WEIGHT
            else make_element_state(self.optimizer.state[layer.tensor], layer.tensor, what)
        )
        part = local_part(whole).detach()
        flat = part.reshape(-1)
        for piece in layer.pieces:
            piece.copy_from(read, flat)
        if not part.is_contiguous():
            part.copy_(flat.view(part.shape))

    def publish_weights(self) -> None:
        """Bring the model's parameters up to date where the optimizer's weights are not the model's own."""
        for backend in _backends.load():
            publish = getattr(backend, "publish_weights", None)
            if publish is not None:
                publish(self.optimizer)


def _stepped_tensors(optimizer: LayerwiseOptimizer) -> list[tuple[int, torch.Tensor]]:
    """All (group index, local tensor) pairs of a whole step, from the backend if it hides them between steps."""
    for backend in _backends.load():
        describe = getattr(backend, "stepped_tensors", None)
        found = describe(optimizer) if describe is not None else None
        if found is not None:
            return found
    return [(index, tensor) for index, group in enumerate(optimizer.param_groups) for tensor in group["params"]]


def _unwrapped(optimizer: Any) -> LayerwiseOptimizer:
    inner = optimizer
    while inner is not None and not isinstance(inner, LayerwiseOptimizer):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise TypeError(
            f"expected an optimizer of trustratio.optimizers or what wraps one, got {type(optimizer).__name__}"
        )
    return inner


# All ranks ----------------------------------------------------------------------------------------------------------


@dataclass
class DescribedLayer:
    """What every rank must know of a layer that some rank holds."""

    shape: tuple[int, ...]
    dtypes: dict[str, torch.dtype]  # of the weight and of each state
    group: int
    options: str
    frozen: bool


@dataclass
class Catalogue:
    """Every layer of all ranks, in the same order on all of them."""

    layers: dict[str, DescribedLayer] = field(default_factory=dict)

    @classmethod
    def of_all_ranks(cls, local: LocalState) -> Catalogue:
        """Put the ranks' layers together.

        Raises:
            OptimizerStateError: On all ranks, if names or shapes clash, or an option is not plain.
        """
        mine, problems = _describe(local)
        catalogue = cls()
        for theirs in of_all_ranks(mine):
            for name, layer in theirs.items():
                known = catalogue.layers.setdefault(name, layer)
                if known.shape != layer.shape:
                    problems.append(f"layer {name} has shape {known.shape} on one rank and {layer.shape} on another")
        raise_together(problems)
        return catalogue

    @property
    def trained(self) -> dict[str, DescribedLayer]:
        """The layers that belong into a file."""
        return {name: layer for name, layer in self.layers.items() if not layer.frozen}

    def groups(self) -> list[dict[str, Any]]:
        """Each group's options and the names of its layers."""
        named: dict[tuple[int, str], list[str]] = {}
        for name, layer in self.trained.items():
            named.setdefault((layer.group, layer.options), []).append(name)
        return [{"options": json.loads(options), "layers": names} for (_, options), names in sorted(named.items())]


def _describe(local: LocalState) -> tuple[dict[str, DescribedLayer], list[str]]:
    """Return this rank's layers by name, and what is wrong with them."""
    twice = [name for name, count in Counter(layer.name for layer in local.layers).items() if count > 1]
    problems = [f"two layers are called {name}: pass `model`, or make the optimizer from named ones" for name in twice]
    options = []
    for index, group in enumerate(local.optimizer.param_groups):
        try:
            options.append(as_json({key: value for key, value in group.items() if key not in NOT_OPTIONS}))
        except TypeError as error:
            problems.append(f"options of group {index} cannot be written as JSON: {error}")
            options.append("")
    return {
        layer.name: DescribedLayer(
            shape=layer.shape,
            dtypes={what: local.dtype(layer, what) for what in (WEIGHT, *local.element_state, *local.layer_state)},
            group=layer.group,
            options=options[layer.group],
            frozen=layer.frozen,
        )
        for layer in local.layers
    }, problems


def as_json(value: Any) -> str:
    """Write plain values; tensors as numbers and tuples as lists.

    Raises:
        TypeError: If a value is none of these.
    """
    return json.dumps(value, default=_numbers)


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is neither a number, a string, a list, a dict nor a tensor")


def share_out(local: LocalState, names: Iterable[str]) -> dict[str, bool]:
    """Decide which ranks write a layer: the replica that contains the lowest rank. Proves that it is complete.

    Returns:
        The layers of which this rank writes its pieces; and for each, whether it writes the per-layer state too.

    Raises:
        OptimizerStateError: On all ranks, if the replicas differ, or the positions of the pieces that would be written
            do not make up the layer.
    """
    index = {name: number for number, name in enumerate(names)}
    layers = [layer for layer in local.layers if layer.name in index]
    if not several_ranks():
        return dict.fromkeys((layer.name for layer in layers), True)
    device = device_for(local.layout.device)
    replicas = dict(zip((layer.name for layer in local.layers), _lowest_rank_of_replica(local), strict=True))
    lowest = torch.tensor([replicas.get(name, dist.get_world_size()) for name in index], device=device)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    chosen = dict(zip(index, lowest.tolist(), strict=True))
    owned = {layer.name: chosen[layer.name] == rank() for layer in layers if replicas[layer.name] == chosen[layer.name]}
    raise_together(_incomplete(local, index, owned, device) + _differing_replicas(local, index, device))
    return owned


def _lowest_rank_of_replica(local: LocalState) -> list[int]:
    """For each local layer, the lowest of the ranks that together hold this rank's copy of it."""
    lowest = torch.full((len(local.layers),), dist.get_rank())
    for process_group, cut in local.layout.reductions:
        columns = torch.tensor(cut)
        packed = lowest[columns].to(reduction_device(process_group, local.layout.device))
        dist.all_reduce(packed, dist.ReduceOp.MIN, group=process_group)
        lowest[columns] = packed.cpu()
    return lowest.tolist()


def prove_positions(local: LocalState) -> None:
    """Prove, for every copy of every layer, that the pieces of the ranks that share it are the layer, by position.

    Raises:
        OptimizerStateError: On all ranks, naming the layers whose elements' positions are not known.
    """
    found = torch.zeros(2, len(local.layers), dtype=torch.float64)
    for column, layer in enumerate(local.layers):
        found[:, column] = torch.tensor(_count_and_position_sum(layer))
    # Sums below 2^53 are exact in fp64, so the moduli of thousands of ranks are.
    totals = local.layout.reduce(found.to(local.layout.device)).long().tolist()
    covers = zip(local.layers, *totals, strict=True)
    raise_together([_not_placed(local, layer) for layer, *total in covers if not _is_whole(layer, *total)])


def _count_and_position_sum(layer: LocalLayer) -> tuple[int, int]:
    sums = [piece.count_and_position_sum() for piece in layer.pieces]
    return sum(count for count, _ in sums), sum(position_sum for _, position_sum in sums) % POSITION_MODULUS


def _is_whole(layer: LocalLayer, count: int, position_sum: int) -> bool:
    numel = prod(layer.shape)
    return count == numel and (position_sum - numel * (numel - 1) // 2) % POSITION_MODULUS == 0


def _not_placed(local: LocalState, layer: LocalLayer) -> str:
    return (
        f"{local.layout.backend} does not tell where all elements of layer {layer.name} {layer.shape} are: its state "
        "cannot be written or read by name. Use the wrapper's own checkpoint"
    )


def _incomplete(local: LocalState, index: dict[str, int], owned: Iterable[str], device: torch.device) -> list[str]:
    """Layers whose owned pieces, by number and position, are not the layer."""
    found = torch.zeros(2, len(index), dtype=torch.int64)
    for name in owned:
        found[:, index[name]] = torch.tensor(_count_and_position_sum(local.by_name[name]))
    found = found.to(device)
    dist.all_reduce(found)
    return [
        _not_placed(local, layer)
        for layer in local.layers
        if layer.name in index and not _is_whole(layer, *found[:, index[layer.name]].tolist())
    ]


def _differing_replicas(local: LocalState, index: dict[str, int], device: torch.device) -> list[str]:
    """Layers whose weights differ between ranks that should hold the same; experts that share a name, for example."""
    squares = torch.zeros(1, len(local.layers), dtype=torch.float64, device=local.layout.device)
    tensors = [local_part(tensor).detach().reshape(-1) for tensor in local.layout.tensors]
    for shard in local.layout.shards:
        run = tensors[local.layout.layers[shard.layer].tensor].narrow(0, shard.start, shard.length)
        for part in run.split(SUMMED_AT_ONCE):
            squares[0, shard.layer] += part.double().square().sum()
    totals = local.layout.reduce(squares)[0].tolist()
    # The largest sum and the negative of the smallest, so that one reduction finds both.
    extremes = torch.full((2, len(index)), -torch.inf, dtype=torch.float64)
    for layer, total in zip(local.layers, totals, strict=True):
        if layer.name in index:
            extremes[:, index[layer.name]] = torch.tensor([total, -total], dtype=torch.float64)
    extremes = extremes.to(device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = extremes[0], -extremes[1]
    differs = (largest - smallest > 1e-9 * largest).tolist()
    return [
        f"ranks hold different weights of layer {layer.name}, which is one layer by its name: give each rank's own "
        "layers their own names, or bring the replicas together before saving"
        for layer in local.layers
        if layer.name in index and differs[index[layer.name]]
    ]
