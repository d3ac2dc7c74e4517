"""FSDP2 (`fully_shard`): what it does with gradients between backward and step, for statistics of group gradients.

In a module's forward, FSDP2 puts an unsharded parameter in the place of each sharded one. Backward makes the gradient
of that tensor, from this rank's one micro-batch; a hook on it sees it before anything is added or reduced. At the end
of the module's backward, FSDP2 packs the gradients of a parameter group and reduce-scatters them in the dtype of its
mixed precision policy, under HSDP followed by an all-reduce over the replicas. After
`set_requires_gradient_sync(False)` it adds them up unsharded instead, after `set_requires_all_reduce(False)` as the
replica's sums, which only the parameter group knows.

A custom reduce-scatter (`set_custom_reduce_scatter`) would see the packed gradients, but of single micro-batches only
where each is reduced, without those that are None, and not on one rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trustratio.optimizers.gradient_statistics.norms import StatisticsError
from trustratio.optimizers.sharding.data_parallel import DataParallel
from trustratio.optimizers.sharding.gradient_flow import Destination, GradientFlow, Slice
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.local_tensors import local_part
from trustratio.optimizers.sharding.refusals import needs_single_gradients

from .internals import (
    holds_gradient,
    parameters_of,
    reduce_dtype,
    reduces_unused,
    replicas,
    shard_group,
    unsharded,
    whole_shape,
)

__all__ = [
    "data_parallel",
    "gradient_dtypes",
    "gradient_flow",
    "modules_of",
    "sharded_parameters",
    "sources",
    "waiting_gradients",
]


def sources(optimizer: Any, module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (sharded parameter, unsharded parameter) of the optimizer's parameters that the module's forward used."""
    if not isinstance(module, FSDPModule):
        return
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for _, parameter in parameters_of(part):
                used = unsharded(parameter)
                if id(parameter.sharded_param) in wanted and used is not None:
                    yield parameter.sharded_param, used


def sharded_parameters(optimizer: Any) -> dict[int, tuple[Any, Any]]:
    """What FSDP2 knows of the optimizer's parameters: (parameter group, parameter) of FSDP2, by the parameter's id."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = {id(parameter) for parameter in parameters if isinstance(parameter, DTensor)}
    if not wanted:
        return {}
    return {
        id(parameter.sharded_param): (group, parameter)
        for module in living(FSDPModule)
        for group, parameter in parameters_of(module)
        if id(parameter.sharded_param) in wanted
    }


def modules_of(wanted: Collection[int]) -> Iterator[FSDPModule]:
    """Yield the modules that have sharded any of the parameters with these ids."""
    for module in living(FSDPModule):
        if any(id(parameter.sharded_param) in wanted for _, parameter in parameters_of(module)):
            yield module


def waiting_gradients(optimizer: Any) -> list[torch.Tensor]:
    """The parameters without a gradient that FSDP2 has kept one of, unsharded or as the replica's sums."""
    pairs = sharded_parameters(optimizer).values()
    parameters = [parameter.sharded_param for group, parameter in pairs if holds_gradient(group, parameter)]
    return [parameter for parameter in parameters if parameter.grad is None]


def gradient_dtypes(optimizer: Any) -> dict[int, torch.dtype]:
    """In which dtype FSDP2 adds up each parameter's gradient, by id: that of its mixed precision policy."""
    return {key: reduce_dtype(group, parameter) for key, (group, parameter) in sharded_parameters(optimizer).items()}


def data_parallel(optimizer: Any) -> DataParallel | None:
    """Return the ranks over which FSDP2 averages gradients, None if it shards none of the optimizer's parameters."""
    for group, _ in sharded_parameters(optimizer).values():
        return DataParallel(shard_group(group), replicas=replicas(group))
    return None


def gradient_flow(optimizer: Any) -> GradientFlow | None:
    """Return where FSDP2 sends gradients, None if it shards none of the optimizer's parameters.

    Raises:
        StatisticsError: Where single gradients cannot be known.
    """
    sharded = sharded_parameters(optimizer)
    if not sharded:
        return None
    _refuse(optimizer, sharded)
    return GradientFlow({key: _destination(*pair) for key, pair in sharded.items()}, sources=True)


def _destination(group: Any, parameter: Any) -> Destination:
    process_group = shard_group(group)
    assert process_group is not None  # _why_not_single
    ranks = dist.get_world_size(process_group)
    dimension = parameter.fsdp_placement.dim
    shape = whole_shape(parameter)
    rows = shape[dimension]
    per_rank = -(-rows // ranks)
    width = shape.numel() // rows if rows else 0
    slices = []
    for owner in range(ranks):
        begin, end = min(owner * per_rank, rows), min((owner + 1) * per_rank, rows)
        if begin < end:
            slices.append(Slice(owner, begin * width, (end - begin) * width, 0))

    def arrange(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in gradient.chunk(ranks, dimension)])

    return Destination(
        process_group,
        parameter.sharded_param,
        tuple(slices),
        kept_whole=False,
        accumulating=lambda: not group.reduce_grads,
        holds=lambda: holds_gradient(group, parameter),
        arrange=arrange if dimension else None,
    )


def _refuse(optimizer: Any, sharded: dict[int, tuple[Any, Any]]) -> None:
    problem = _why_not_single(optimizer, sharded)
    if problem is not None:
        instead = "one mesh of fully_shard for the whole model, DDP or DeepSpeed ZeRO"
        raise StatisticsError(needs_single_gradients(optimizer, problem, instead))
    if optimizer.statistics.squares and any(reduces_unused(group) for group, _ in sharded.values()):
        raise StatisticsError(
            f"{type(optimizer).__name__} sends the squares of gradients where FSDP2 sends gradients, and with "
            "set_reduce_scatter_unused_params(True) ranks need not have the same ones: turn that off"
        )


def _why_not_single(optimizer: Any, sharded: dict[int, tuple[Any, Any]]) -> str | None:
    """Why a rank does not see the gradient of each of its micro-batches; None if it does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in sharded for parameter in parameters if parameter.requires_grad):
        return "fully_shard has sharded only some of the optimizer's parameters"
    shard_groups = [shard_group(group) for group, _ in sharded.values()]
    meshes = {None if group is None else tuple(dist.get_process_group_ranks(group)) for group in shard_groups}
    if None in meshes or len(meshes) != 1:
        return "fully_shard has sharded the optimizer's parameters on different meshes, or not at all"
    if any(parameter.is_dtensor for _, parameter in sharded.values()):
        return "tensor parallelism leaves each rank a part of it"
    if any(hasattr(local_part(parameter.sharded_param), "fsdp_pre_all_gather") for _, parameter in sharded.values()):
        return "that of tensor subclasses that gather themselves cannot be seen"
    return None
