"""FSDP2 and DTensor: all that is read of them and that torch does not document, with the versions that have it.

    of                              what                                                            since torch
    the state of an FSDPModule      _fsdp_param_group, one or None                                  2.6
                                    _fsdp_param_groups in its place                                 2.12
    a parameter group               fsdp_params, mp_policy, mesh_info, reduce_grads                 2.6
                                    _partial_reduce_output                                          2.6
                                    reduce_scatter_unused_params; before it such gradients never
                                    were reduced                                                    2.13
    a parameter                     sharded_param, _unsharded_param, _orig_size,                    2.6
                                    fsdp_placement, is_dtensor, unsharded_accumulated_grad
    a placement                     _split_tensor                                                   2.6
    torch.distributed.tensor        placement_types._StridedShard                                   2.6
                                    _utils.compute_local_shape_and_global_offset                    2.6

Since that version, up to the last one that `INTERNALS` names, which is from where to where tests ran; that attributes
were there before is no promise. Versions before 2.6 were not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from trustratio.optimizers.sharding.internals import Internals

INTERNALS = Internals("FSDP2 (fully_shard)", "torch", "2.9 to 2.14")

try:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard
except ImportError as error:
    raise ImportError(INTERNALS.lacks(error.name or str(error))) from error

__all__ = [
    "INTERNALS",
    "compute_local_shape_and_global_offset",
    "holds_gradient",
    "is_strided",
    "parameters_of",
    "reduce_dtype",
    "reduces_unused",
    "replicas",
    "shard_group",
    "split",
    "unsharded",
    "whole_shape",
]


def parameters_of(module: FSDPModule) -> Iterator[tuple[Any, Any]]:
    """Yield (parameter group, parameter) of FSDP2's own bookkeeping of a module."""
    state = INTERNALS.read(module, "_get_fsdp_state")()
    found = INTERNALS.read(state, "_fsdp_param_groups", "_fsdp_param_group")
    groups = found if isinstance(found, (list, tuple)) else [found]
    for group in groups:
        if group is not None:  # of a module without parameters of its own, before 2.12
            for parameter in INTERNALS.read(group, "fsdp_params"):
                yield group, parameter


def unsharded(parameter: Any) -> torch.Tensor | None:
    """The tensor that the module's forward uses in a sharded parameter's place; None before the first forward."""
    return getattr(parameter, "_unsharded_param", None)


def holds_gradient(group: Any, parameter: Any) -> bool:
    """Whether the next gradient of a parameter will be added to what is there.

    It is kept reduced, unsharded, or under HSDP as the replica's sums, which nothing but the all-reduce takes away.
    """
    used = unsharded(parameter)
    kept = (
        parameter.sharded_param.grad,
        getattr(parameter, "unsharded_accumulated_grad", None),
        getattr(group, "_partial_reduce_output", None),
    )
    return any(gradient is not None for gradient in (*kept, None if used is None else used.grad))


def whole_shape(parameter: Any) -> torch.Size:
    """The layer's shape."""
    return INTERNALS.read(parameter, "_orig_size")


def reduce_dtype(group: Any, parameter: Any) -> torch.dtype:
    """In which dtype a parameter's gradients are added up: that of the group's mixed precision policy."""
    policy = INTERNALS.read(group, "mp_policy")
    return policy.reduce_dtype or policy.param_dtype or INTERNALS.read(parameter, "sharded_param").dtype


def reduces_unused(group: Any) -> bool:
    """Whether gradients of parameters that this rank did not use are reduced too."""
    return getattr(group, "reduce_scatter_unused_params", False)


def shard_group(group: Any) -> dist.ProcessGroup | None:
    """The ranks among which a parameter group is sharded, None where it is only replicated."""
    return getattr(INTERNALS.read(group, "mesh_info"), "shard_process_group", None)


def replicas(group: Any) -> dist.ProcessGroup | None:
    """The ranks that hold the same shards of a parameter group, None where there is one replica."""
    return getattr(INTERNALS.read(group, "mesh_info"), "replicate_process_group", None)


def is_strided(placement: Any) -> TypeGuard[_StridedShard]:
    """Whether it is the placement of several pieces per rank."""
    return isinstance(placement, _StridedShard)


def split(placement: Any, tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Cut a tensor as the placement cuts a layer, into one part per rank."""
    parts, _ = INTERNALS.read(placement, "_split_tensor")(tensor, ranks, with_padding=False, contiguous=False)
    return parts
