"""What all ranks hold together of an optimizer's weights and state, who writes what, and the proofs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.local_tensors import local_part, reduction_device, summable

from .local_state import LocalLayer, LocalState
from .plain import as_json
from .ranks import device_for, of_rank, raise_together, rank, ranks_that_differ, several_ranks

__all__ = ["Catalogue", "prove_positions", "share_out"]

NOT_OPTIONS = ("params", "param_names")
POSITION_MODULUS = 1 << 40  # sums of positions are compared modulo this, so that they never overflow
SUMMED_AT_ONCE = 1 << 20  # elements that are widened to fp64 at a time


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
        for source in ranks_that_differ(mine):
            new = {name: layer for name, layer in mine.items() if name not in catalogue.layers}
            catalogue.layers.update(of_rank(source, new if rank() == source else None))
        for name, layer in mine.items():
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
            dtypes={what: local.dtype(layer, what) for what in local.kept_of(layer)},
            group=layer.group,
            options=options[layer.group],
            frozen=layer.frozen,
        )
        for layer in local.layers
    }, problems


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
    lowest = torch.full((len(local.layers),), dist.get_rank(), device="cpu")
    for process_group, cut in local.layout.reductions:
        columns = torch.tensor(cut, device="cpu")
        packed = lowest[columns].to(reduction_device(process_group, local.layout.device))
        dist.all_reduce(packed, dist.ReduceOp.MIN, group=process_group)
        lowest[columns] = packed.cpu()
    return lowest.tolist()


def prove_positions(local: LocalState) -> None:
    """Prove, for every copy of every layer, that the pieces of the ranks that share it are the layer, by position.

    Raises:
        OptimizerStateError: On all ranks, naming the layers whose elements' positions are not known.
    """
    sums = torch.zeros(2, len(local.layers), dtype=torch.float64, device="cpu")
    for column, layer in enumerate(local.layers):
        sums[:, column] = torch.tensor(_count_and_position_sum(layer), device="cpu")
    # Sums below 2^53 are exact in fp64, so the moduli of thousands of ranks are.
    totals = local.layout.reduce(sums.to(local.layout.numbers_device)).long().tolist()
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
    sums = torch.zeros(2, len(index), dtype=torch.int64, device="cpu")
    for name in owned:
        sums[:, index[name]] = torch.tensor(_count_and_position_sum(local.by_name[name]), device="cpu")
    sums = sums.to(device)
    dist.all_reduce(sums)
    return [
        _not_placed(local, layer)
        for layer in local.layers
        if layer.name in index and not _is_whole(layer, *sums[:, index[layer.name]].tolist())
    ]


def _differing_replicas(local: LocalState, index: dict[str, int], device: torch.device) -> list[str]:
    """Layers whose weights differ between ranks that should hold the same; experts that share a name, for example."""
    squares = torch.zeros(1, len(local.layers), dtype=torch.float64, device=local.layout.numbers_device)
    tensors = [local_part(tensor).detach().reshape(-1) for tensor in local.layout.tensors]
    for shard in local.layout.shards:
        run = tensors[local.layout.layers[shard.layer].tensor].narrow(0, shard.start, shard.length)
        for part in run.split(SUMMED_AT_ONCE):
            squares[0, shard.layer] += summable(part).double().square().sum()
    totals = local.layout.reduce(squares)[0].tolist()
    # The largest sum and the negative of the smallest, so that one reduction finds both.
    extremes = torch.full((2, len(index)), -torch.inf, dtype=torch.float64, device="cpu")
    for layer, total in zip(local.layers, totals, strict=True):
        if layer.name in index:
            extremes[:, index[layer.name]] = torch.tensor([total, -total], dtype=torch.float64, device="cpu")
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
