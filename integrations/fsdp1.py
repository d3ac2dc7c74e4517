"""FSDP1 (`FullyShardedDataParallel`) with `use_orig_params=True`: where the layers are in its flat parameters.

FSDP1 concatenates the parameters of a module into one flat parameter, pads it and cuts it into equal pieces, one per
rank. With `use_orig_params=True` the optimizer keeps the model's own parameter objects, but between backward and
forward each holds only what the rank's piece has of it: a flat run of elements, or nothing. The layers' shapes and the
runs are in the handle of the flat parameter:

    sharding strategy                  a parameter holds                 the layer's sums are added
    FULL_SHARD, SHARD_GRAD_OP          its run, which may be empty       over the process group
    HYBRID_SHARD, _HYBRID_SHARD_ZERO2  the same                          over the sharding group, not over replicas
    NO_SHARD                           the whole layer                   not at all

What of this torch does not document is read in this file alone, and the same since torch 2.6: `_params`, `_shapes`,
`_shard_param_infos` and `_param_extensions` of the flat parameter, `uses_sharded_strategy` of its handle, `_handle` and
`_inter_node_pg` of the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.internals import Internals
from trustratio.optimizers.sharding.layout import Layout, LayoutError
from trustratio.optimizers.sharding.layout_builder import LayoutBuilder
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.local_tensors import is_flattened
from trustratio.optimizers.sharding.observed import held_by_wrappers
from trustratio.optimizers.sharding.parts import Part
from trustratio.optimizers.sharding.refusals import refuse_rows, refuse_statistics
from trustratio.optimizers.sharding.unsharded import may_be_cut, name_layers, refuse_strangers

INTERNALS = Internals("FSDP1", "torch", "2.9 to 2.14")

try:
    from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
except ImportError as error:
    raise ImportError(INTERNALS.lacks(error.name or str(error))) from error

__all__ = ["FSDP1Backend", "flattened_shapes"]

BACKEND = "FSDP1"
PREFIX = "_fsdp_wrapped_module."


@dataclass(frozen=True)
class _Run:
    """What this rank holds of one layer: `length` elements from `offset` on.

    `is_dtensor` tells that the layer is a DTensor, of whose local part `shape` is.
    """

    handle: FlatParamHandle
    shape: tuple[int, ...]
    offset: int
    length: int
    is_dtensor: bool


class FSDP1Backend(Backend):
    """Explains the parameters of modules under FullyShardedDataParallel, and plain parameters beside them."""

    def __init__(self) -> None:
        self._handles: WeakKeyDictionary[Any, tuple[frozenset[int], WeakSet[FlatParamHandle]]] = WeakKeyDictionary()

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout if FSDP1 has flattened any of the tensors.

        Raises:
            LayoutError: If it did so with `use_orig_params=False`, or the optimizer cannot be exact.
        """
        flattened = [tensor for _, tensor in tensors if is_flattened(tensor)]
        if not flattened:
            return None
        runs, replicas = dict(_runs()), dict(_replicas())
        _refuse_flat_parameters(tensor for tensor in flattened if id(tensor) not in runs)
        refuse_strangers(optimizer, [tensor for _, tensor in tensors if id(tensor) not in runs])
        _refuse_optimizer(optimizer)
        builder = LayoutBuilder(BACKEND)
        for (group, tensor), (key, name) in zip(tensors, name_layers(optimizer, tensors), strict=True):
            name, run = name.replace(PREFIX, ""), runs.get(key)
            if run is not None:
                _refuse_tensor_parallelism(name, tensor, run)
                whole, over = Part.all_of(run.shape), [run.handle.process_group]
                same_on = [replicas[id(run.handle)]] if id(run.handle) in replicas else []
                if not run.handle.uses_sharded_strategy:
                    over, same_on = [], over
                builder.carry(group, tensor)
                builder.add(name, tensor, whole, offset=run.offset, length=run.length, over=over, same_on=same_on)
            elif tensor.numel():
                builder.carry(group, tensor)
                builder.add(name, tensor, Part.all_of(tensor.shape), length=tensor.numel())
        return builder.layout()

    def publish_weights(self, optimizer: Any) -> None:
        """Free what forward has gathered of the weights before they were changed, as that of an evaluation is kept."""
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(map(is_flattened, stepped)):
            return
        for handle in self._handles_of(held_by_wrappers(optimizer), frozenset(map(id, stepped))):
            if handle.uses_sharded_strategy and _is_gathered(handle):
                handle.reshard(True)
                handle.post_reshard()

    def _handles_of(self, optimizer: Any, wanted: frozenset[int]) -> list[FlatParamHandle]:
        """Those that have flattened any of these parameters; searched for once per set of parameters."""
        known, handles = self._handles.get(optimizer, (None, WeakSet()))
        if known != wanted:
            handles = WeakSet(run.handle for key, run in _runs() if key in wanted)
            self._handles[optimizer] = wanted, handles
        return list(handles)


def _is_gathered(handle: FlatParamHandle) -> bool:
    """Whether the handle keeps whole parameters that a forward has gathered."""
    try:
        return not handle.needs_unshard()
    except AttributeError:  # before the first forward
        return False


def _runs() -> Iterator[tuple[int, _Run]]:
    """Yield (id, run) of every parameter that FSDP1 has kept as an object of its own. None has a way to its handle."""
    for handle in living(FlatParamHandle):
        if not hasattr(handle, "flat_param") and not _is_in_use(handle):
            continue
        flat = INTERNALS.read(handle, "flat_param")
        parameters = INTERNALS.read(flat, "_params") or ()
        known = (INTERNALS.read(flat, name) for name in ("_shapes", "_shard_param_infos", "_param_extensions"))
        of_parameters = zip(parameters, *known, strict=False)
        for parameter, shape, shard, extension in of_parameters:
            if not handle.uses_sharded_strategy:
                offset, length = 0, parameter.numel()
            else:
                offset, length = shard.intra_param_start_idx or 0, shard.numel_in_shard or 0
            yield id(parameter), _Run(handle, tuple(shape), offset, length, extension is not None)


def _is_in_use(handle: FlatParamHandle) -> bool:
    """Whether a module has it. None has one that has failed to flatten, which a traceback that is kept keeps alive."""
    return any(vars(module).get("_handle") is handle for module in living(FullyShardedDataParallel))


def _replicas() -> Iterator[tuple[int, dist.ProcessGroup]]:
    """Yield (id of a handle, ranks that hold the same shards) where replicas are sharded."""
    for module in living(FullyShardedDataParallel):
        handle, ranks = vars(module).get("_handle"), vars(module).get("_inter_node_pg")
        if handle is not None and ranks is not None:
            yield id(handle), ranks


def flattened_shapes(model: torch.nn.Module) -> dict[int, torch.Size]:
    """Return the layers' own shapes, by the ids of the parameters that FSDP1 has flattened in the model."""
    handles = [INTERNALS.read(module, "_handle") for module in FullyShardedDataParallel.fsdp_modules(model)]
    flats = [handle.flat_param for handle in handles if handle is not None]
    return {
        id(parameter): shape
        for flat in flats
        for parameter, shape in zip(INTERNALS.read(flat, "_params") or (), INTERNALS.read(flat, "_shapes"), strict=True)
    }


# Refusals -----------------------------------------------------------------------------------------------------------


def _refuse_flat_parameters(tensors: Iterator[torch.Tensor]) -> None:
    for tensor in tensors:
        kind = "a FlatParameter" if isinstance(tensor, FlatParameter) else "a parameter"
        raise LayoutError(
            f"{kind} of shape {tuple(tensor.shape)} that FSDP1 has flattened together with others, so that the layers "
            "in it cannot have parameter groups of their own: pass use_orig_params=True to FullyShardedDataParallel"
        )


def _refuse_tensor_parallelism(name: str, parameter: torch.Tensor, run: _Run) -> None:
    if run.is_dtensor or may_be_cut(parameter):
        raise LayoutError(
            f"layer {name} is cut by tensor parallelism, and {BACKEND} has flattened this rank's part of shape "
            f"{run.shape}: not supported. Use parallelize_module and FSDP2 (fully_shard), or DeepSpeed ZeRO with "
            "AutoTP or mpu="
        )


def _refuse_optimizer(optimizer: Any) -> None:
    instead = "FSDP2 (fully_shard), DDP or DeepSpeed ZeRO"
    refuse_statistics(optimizer, f"{BACKEND} makes it for whole flat parameters", instead)
    refuse_rows(optimizer, f"which is not supported under {BACKEND}", f"use {instead}")


register_backend(FSDP1Backend())
