"""FSDP2 (`fully_shard`), HSDP and every other use of DTensor: where the layers are on a device mesh.

A DTensor is one layer. Its placements say what each dimension of its mesh does with it:

    placement                               this rank holds              the layer's sums are added
    Replicate                               the same as its neighbours   not over this dimension
    Shard, along any dimension of a layer   its part, which may be empty over this dimension's process group
    Partial                                 a summand of the weights     refused

HSDP is (Replicate, Shard(0)) on a mesh of two dimensions. A layer that is cut over both dimensions, as FSDP2 over
tensor parallelism cuts it, is summed over one and then over the other. State is made of DTensors with the parameter's
placements, so that torch.distributed.checkpoint knows how to save it; the arithmetic is done on local tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trustratio.optimizers.sharding.backends import Backend, register_backend, tensor_parallel_groups
from trustratio.optimizers.sharding.data_parallel import DataParallel
from trustratio.optimizers.sharding.differences import first_difference
from trustratio.optimizers.sharding.gradient_flow import GradientFlow
from trustratio.optimizers.sharding.layout import Layout, LayoutError, Shard, listing
from trustratio.optimizers.sharding.layout_builder import LayoutBuilder
from trustratio.optimizers.sharding.local_tensors import is_plain, local_part
from trustratio.optimizers.sharding.observed import ObservedOptimizer, held_by_wrappers
from trustratio.optimizers.sharding.parts import Part
from trustratio.optimizers.sharding.refusals import refuse_rows, refuse_statistics
from trustratio.optimizers.sharding.unsharded import may_be_cut, name_layers, refuse_strangers

from .gradients import (
    data_parallel,
    gradient_dtypes,
    gradient_flow,
    modules_of,
    sharded_parameters,
    sources,
    waiting_gradients,
)
from .internals import compute_local_shape_and_global_offset, is_strided
from .placements import local_indices

__all__ = ["DTensorBackend"]

BACKEND = "FSDP2 (DTensor)"


class DTensorBackend(Backend):
    """Explains DTensor parameters, whoever made them, and plain parameters beside them."""

    replacing_modules = (FSDPModule,)

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[Any, tuple[frozenset[int], WeakSet[FSDPModule]]] = WeakKeyDictionary()

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout if any of the tensors is a DTensor.

        The constructor need not have been given them: accelerate makes the optimizer first, and replaces its
        parameters by their DTensors.

        Raises:
            LayoutError: If the optimizer cannot be exact, or a parameter is of a kind that is not supported.
        """
        if not any(isinstance(tensor, DTensor) for _, tensor in tensors):
            return None
        refuse_strangers(optimizer, [tensor for _, tensor in tensors if not isinstance(tensor, DTensor)])
        _refuse_optimizer(optimizer, [tensor for _, tensor in tensors])
        dtypes = {} if optimizer.statistics is None else gradient_dtypes(optimizer)
        present = [(group, tensor) for group, tensor in tensors if tensor.numel()]
        names = _names(optimizer, tensors)
        for _, tensor in present:
            _refuse_kind(names[id(tensor)], tensor)
        _refuse_replaced(optimizer, present, names)
        if any(tensor.grad is None for _, tensor in present):
            _refuse_waiting(optimizer, names)
        _agree_on_placements([tensor for _, tensor in present], names)
        builder = LayoutBuilder(BACKEND)
        for group, tensor in present:
            name, whole = names[id(tensor)], Part.all_of(tensor.shape)
            builder.carry(group, tensor)
            over, same_on = _groups_of_mesh(tensor)
            dtype = dtypes.get(id(tensor))
            layer = builder.add(name, tensor, whole, over=over, same_on=same_on, gradient_dtype=dtype)
            if local_part(tensor).numel():
                builder.shards.extend(_shards(layer, name, tensor))
        return builder.layout()

    def data_parallel(self, optimizer: Any) -> DataParallel | None:
        """Return the ranks over which fully_shard averages gradients, None without it."""
        return data_parallel(optimizer)

    def gradient_flow(self, optimizer: Any) -> GradientFlow | None:
        """Return where fully_shard sends gradients, None without it."""
        return gradient_flow(optimizer)

    def sources(self, optimizer: Any, module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (parameter, tensor that the module's forward used in its place)."""
        return sources(optimizer, module)

    def publish_weights(self, optimizer: Any) -> None:
        """Free what forward has gathered of the weights before they were changed, as that of an evaluation is kept."""
        for module in self._modules_of(optimizer):
            module.reshard()

    def _modules_of(self, optimizer: Any) -> list[FSDPModule]:
        """Those that shard the optimizer's parameters; searched for once per set of parameters."""
        inner = held_by_wrappers(optimizer)
        wanted = frozenset(id(p) for group in inner.param_groups for p in group["params"] if isinstance(p, DTensor))
        known, modules = self._modules.get(inner, (None, WeakSet()))
        if known != wanted:
            modules = WeakSet(modules_of(wanted) if wanted else ())
            self._modules[inner] = wanted, modules
        return list(modules)


def _names(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> dict[int, str]:
    """Each parameter's name by id; where it was put in place of another, that one's."""
    names = dict(name_layers(optimizer, tensors))
    # Of another optimizer than ours the names are known, those of DTensors too.
    for group in () if isinstance(optimizer, ObservedOptimizer) else optimizer.param_groups:
        names_before = group.get("param_names") or ()
        if len(names_before) == len(group["params"]):
            names.update({id(p): name for p, name in zip(group["params"], names_before, strict=True)})
    return names


def _refuse_waiting(optimizer: Any, names: Mapping[int, str]) -> None:
    kept_back = set(map(id, waiting_gradients(optimizer)))
    waiting = [name for key, name in names.items() if key in kept_back]
    if waiting:
        raise LayoutError(
            f"fully_shard keeps gradients back that step() would not see, of {listing(waiting)}: call "
            "set_requires_gradient_sync(True) and set_requires_all_reduce(True) before the last backward() of a step"
        )


def _shard(layer: int, tensor: torch.Tensor) -> Shard:
    """What this rank has of the layer, which must not be empty: the block from its first to its last element."""
    if not isinstance(tensor, DTensor):
        return Shard(layer, 0, 0, tensor.numel())
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    strides = [prod(tensor.shape[dimension + 1 :]) for dimension in range(tensor.dim())]
    local = local_part(tensor)
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    reach = sum((size - 1) * stride for size, stride in zip(local.shape, strides, strict=True))
    return Shard(layer, 0, first, local.numel(), span=reach + 1)


def _shards(layer: int, name: str, tensor: torch.Tensor) -> list[Shard]:
    """What this rank has of the layer: one block, or one per run of rows where rows are cut in several."""
    block = _shard(layer, tensor)
    if not isinstance(tensor, DTensor) or not _strided_dimensions(tensor):
        return [block]
    indices = local_indices(name, tensor)
    if [len(index) for index in indices] != list(local_part(tensor).shape):
        return [block]  # the proof counts its elements, on all ranks
    rows, *others = indices
    strides = [prod(tensor.shape[dimension + 1 :]) for dimension in range(tensor.dim())]
    column = sum(int(index[0]) * stride for index, stride in zip(others, strides[1:], strict=True))
    reach = sum((len(index) - 1) * stride for index, stride in zip(others, strides[1:], strict=True))
    in_row = prod(len(index) for index in others)
    shards, start = [], 0
    for run in rows.tensor_split((rows.diff() != 1).nonzero().flatten() + 1):
        span = (len(run) - 1) * strides[0] + reach + 1
        shards.append(Shard(layer, start, int(run[0]) * strides[0] + column, len(run) * in_row, span))
        start += len(run) * in_row
    return shards


def _strided_dimensions(tensor: torch.Tensor) -> list[int]:
    """The dimensions of which a rank has several pieces, as of fused matrices: `_StridedShard` for its own sake.

    fully_shard over tensor parallelism makes a `_StridedShard` too, whose pieces the later mesh dimensions take apart.
    """
    if not isinstance(tensor, DTensor):
        return []
    strided = []
    for mesh_dimension, placement in enumerate(tensor.placements):
        later = prod(
            tensor.device_mesh.size(other)
            for other in range(mesh_dimension + 1, tensor.device_mesh.ndim)
            if getattr(tensor.placements[other], "dim", None) == getattr(placement, "dim", None)
        )
        if is_strided(placement) and placement.split_factor != later:
            strided.append(placement.dim)
    return strided


def _groups_of_mesh(tensor: torch.Tensor) -> tuple[list[dist.ProcessGroup], list[dist.ProcessGroup]]:
    """The process groups of the mesh dimensions that cut a layer, and of those that repeat it."""
    cut: list[dist.ProcessGroup] = []
    repeated: list[dist.ProcessGroup] = []
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            (repeated if placement.is_replicate() else cut).append(tensor.device_mesh.get_group(dimension))
    return cut, repeated


# Refusals -----------------------------------------------------------------------------------------------------------


def _refuse_optimizer(optimizer: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if the optimizer needs more of a layer than sums over its elements, and cannot have it."""
    if optimizer.statistics is not None:
        sharded = sharded_parameters(optimizer)
        known = all(id(tensor) in sharded for tensor in tensors)
        problem = "that is known of parameters that fully_shard has sharded, and of no other DTensors"
        refuse_statistics(optimizer, None if known else problem, "DDP, FSDP2 or DeepSpeed ZeRO alone")
    clipped = [group["params"] for group in optimizer.param_groups if optimizer.has_rows(group)]
    if not all(_has_whole_rows(tensor) for parameters in clipped for tensor in parameters):
        problem = f"of which each must be whole on one rank under {BACKEND}"
        refuse_rows(optimizer, problem, "shard embeddings with Shard(0)")


def _has_whole_rows(tensor: torch.Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return True
    by_rows = all(placement.is_replicate() or placement.is_shard(0) for placement in tensor.placements)
    return by_rows and not _strided_dimensions(tensor)


def _refuse_kind(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, DTensor):
        return
    partial = [placement for placement in tensor.placements if placement.is_partial()]
    if partial:
        raise LayoutError(
            f"parameter {name} has placements {tensor.placements}: no rank knows its weights, which are sums over "
            "ranks. Redistribute it to Shard or Replicate"
        )
    strided = [dimension for dimension in _strided_dimensions(tensor) if dimension > 0]
    if strided:
        raise LayoutError(
            f"parameter {name} has placements {tensor.placements}, which leave a rank several pieces along dimension "
            f"{strided[0]}: supported along dimension 0 only. Store the matrix transposed, or as several parameters"
        )
    local = local_part(tensor)
    if not is_plain(local):
        raise LayoutError(f"parameter {name} is a DTensor of {type(local).__name__}: not supported")
    if tensor.device_mesh.get_coordinate() is None:
        raise LayoutError(f"parameter {name} lies on {tensor.device_mesh}, which this rank is not part of")
    if may_be_cut(tensor) or _may_have_lost_marks(tensor):
        raise LayoutError(
            f"parameter {name} is a DTensor on {tensor.device_mesh}, and Megatron's tensor parallelism may have cut it "
            "over other ranks before, which fully_shard forgets: not supported. Use parallelize_module under "
            "fully_shard, or DeepSpeed ZeRO with mpu="
        )


def _may_have_lost_marks(tensor: DTensor) -> bool:
    """Whether there are tensor-parallel ranks outside the mesh. fully_shard drops a parameter's marks."""
    on_mesh = set(tensor.device_mesh.mesh.flatten().tolist())
    return any(set(dist.get_process_group_ranks(ranks)) - on_mesh for ranks in tensor_parallel_groups(tensor))


def _refuse_replaced(optimizer: Any, present: Sequence[tuple[int, torch.Tensor]], names: Mapping[int, str]) -> None:
    """Raise if a parameter was put in place of another that has state: its own would silently start from zero."""
    # Frozen ones are not present, and keep the state that they have.
    current = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    abandoned = {tuple(tensor.shape) for tensor in optimizer.state if id(tensor) not in current}
    for _, tensor in present:
        if tensor not in optimizer.state and tuple(tensor.shape) in abandoned:
            raise LayoutError(
                f"parameter {names[id(tensor)]} was replaced after the first step, so that the optimizer's state "
                "belongs to the one before. Make a new optimizer, and carry the state over with "
                "get_optimizer_state_dict and set_optimizer_state_dict of torch.distributed.checkpoint.state_dict"
            )


def _agree_on_placements(tensors: Sequence[torch.Tensor], names: Mapping[int, str]) -> None:
    """Check over every dimension of every mesh that its ranks cut the same layers in the same way.

    Raises:
        LayoutError: On every rank of a process group alike, naming the first layer on which its ranks differ.
    """
    by_group: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[str]]] = {}
    meshes: dict[int, str] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            if id(mesh) not in meshes:
                meshes[id(mesh)] = str(mesh.mesh.tolist())
            cut = f"({names[id(tensor)]}, {tuple(tensor.shape)}, {tensor.placements}, {meshes[id(mesh)]})"
            for process_group in mesh.get_all_groups():
                ranks = tuple(dist.get_process_group_ranks(process_group))
                by_group.setdefault(ranks, (process_group, []))[1].append(cut)
    for process_group, cuts in by_group.values():
        of_ranks = first_difference(cuts, process_group)
        if of_ranks is not None:
            rank = next(rank for rank, cut in enumerate(of_ranks) if cut != of_ranks[0])
            raise LayoutError(
                f"ranks disagree about the mesh or the placements of a parameter: {of_ranks[0]} on the first rank of a "
                f"process group, {of_ranks[rank]} on its rank {rank} (name, shape, placements, mesh). Shard the model "
                "in the same way on all ranks"
            )


register_backend(DTensorBackend())
