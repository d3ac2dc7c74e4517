"""FSDP1 (`FullyShardedDataParallel`) with `use_orig_params=True`: where the layers are in its flat parameters.

FSDP1 concatenates the parameters of a module into one flat parameter, pads it and cuts it into equal pieces, one per
rank. With `use_orig_params=True` the optimizer keeps the model's own parameter objects, but between backward and
forward each holds only what the rank's piece has of it: a flat run of elements, or nothing. The layers' shapes and the
runs are in the handle of the flat parameter:

    sharding strategy                  a parameter holds                 the layer's sums are added
    FULL_SHARD, SHARD_GRAD_OP          its run, which may be empty       over the process group
    HYBRID_SHARD, _HYBRID_SHARD_ZERO2  the same                          over the sharding group, not over replicas
    NO_SHARD                           the whole layer                   not at all

Read from torch 2.13.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle

from trustratio.optimizers.sharding.backends import register_backend
from trustratio.optimizers.sharding.layout import Layer, Layout, LayoutError, Shard
from trustratio.optimizers.sharding.unsharded import may_be_cut, name_layers, refuse_strangers

__all__ = ["FSDP1Backend"]

BACKEND = "FSDP1"
PREFIX = "_fsdp_wrapped_module."


@dataclass(frozen=True)
class _Part:
    """What this rank holds of one layer: `length` elements from `offset` on.

    `is_dtensor` tells that the layer is a DTensor, of whose local part `shape` is.
    """

    handle: FlatParamHandle
    shape: tuple[int, ...]
    offset: int
    length: int
    is_dtensor: bool


class FSDP1Backend:
    """Explains the parameters of modules under FullyShardedDataParallel, and plain parameters beside them."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Do nothing: any optimizer may be stepped under FSDP1."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout if FSDP1 has flattened any of the tensors.

        Raises:
            LayoutError: If it did so with `use_orig_params=False`, or the optimizer cannot be exact.
        """
        flattened = [tensor for _, tensor in tensors if getattr(tensor, "_fsdp_flattened", False)]
        if not flattened:
            return None
        parts = dict(_parts())
        _refuse_flat_parameters(tensor for tensor in flattened if id(tensor) not in parts)
        refuse_strangers(optimizer, [tensor for _, tensor in tensors if id(tensor) not in parts])
        _refuse_optimizer(optimizer)
        present = [(group, tensor) for group, tensor in tensors if id(tensor) in parts or tensor.numel()]
        names = {key: name.replace(PREFIX, "") for key, name in name_layers(optimizer, tensors)}
        for _, tensor in present:
            _refuse_tensor_parallelism(names[id(tensor)], tensor, parts.get(id(tensor)))
        layers: list[Layer] = []
        shards: list[Shard] = []
        cut: dict[int, tuple[dist.ProcessGroup, list[int]]] = {}
        for index, (_, tensor) in enumerate(present):
            part = parts.get(id(tensor))
            shape = tuple(tensor.shape) if part is None else part.shape
            layers.append(Layer(names[id(tensor)], shape, index, tensor))
            offset, length = (0, tensor.numel()) if part is None else (part.offset, part.length)
            if length:
                shards.append(Shard(index, 0, offset, length))
            if part is not None and part.handle.uses_sharded_strategy:
                group = part.handle.process_group
                cut.setdefault(id(group), (group, []))[1].append(index)
        return Layout(
            backend=BACKEND,
            tensors=tuple(tensor for _, tensor in present),
            groups=tuple(group for group, _ in present),
            layers=tuple(layers),
            shards=tuple(shards),
            reductions=tuple((group, tuple(indices)) for group, indices in cut.values()),
            placed=True,
        )


def _handles() -> Iterator[FlatParamHandle]:
    """All handles of this process. Parameters leave no reference to theirs; this runs once per layout."""
    for candidate in gc.get_objects():
        # type() rather than isinstance(), which would run the __class__ property of foreign proxy objects.
        if issubclass(type(candidate), FlatParamHandle):
            yield candidate


def _parts() -> Iterator[tuple[int, _Part]]:
    """Yield (id, part) of every parameter that FSDP1 has kept as an object of its own."""
    for handle in _handles():
        flat = handle.flat_param
        of_parameters = zip(
            flat._params or (), flat._shapes, flat._shard_param_infos, flat._param_extensions, strict=False
        )
        for parameter, shape, found, extension in of_parameters:
            if not handle.uses_sharded_strategy:
                offset, length = 0, parameter.numel()
            else:
                offset, length = found.intra_param_start_idx or 0, found.numel_in_shard or 0
            yield id(parameter), _Part(handle, tuple(shape), offset, length, extension is not None)


# Refusals -----------------------------------------------------------------------------------------------------------


def _refuse_flat_parameters(tensors: Iterator[torch.Tensor]) -> None:
    for tensor in tensors:
        kind = "a FlatParameter" if isinstance(tensor, FlatParameter) else "a parameter"
        raise LayoutError(
            f"{kind} of shape {tuple(tensor.shape)} that FSDP1 has flattened together with others, so that the layers "
            "in it cannot have parameter groups of their own: pass use_orig_params=True to FullyShardedDataParallel"
        )


def _refuse_tensor_parallelism(name: str, parameter: torch.Tensor, part: _Part | None) -> None:
    if part is not None and (part.is_dtensor or may_be_cut(parameter)):
        raise LayoutError(
            f"layer {name} is cut by tensor parallelism, and {BACKEND} has flattened this rank's part of shape "
            f"{part.shape}: not supported. Use parallelize_module and FSDP2 (fully_shard), or DeepSpeed ZeRO with "
            "AutoTP or mpu="
        )


def _refuse_optimizer(optimizer: Any) -> None:
    name = type(optimizer).__name__
    if optimizer.statistics is not None:
        raise LayoutError(
            f"{name} needs the gradient of every single micro-batch of every layer, which {BACKEND} makes for whole "
            "flat parameters: not supported. Use FSDP2 (fully_shard), DDP or DeepSpeed ZeRO for CLARS, the VR "
            "optimizers and collect_group_norms()"
        )
    if any(optimizer.has_rows(group) for group in optimizer.param_groups):
        raise LayoutError(
            f"{name} clips rows of embeddings, which is not supported under {BACKEND}: use FSDP2 (fully_shard), DDP or "
            "DeepSpeed ZeRO, or put the embeddings into a group with cowclip=False"
        )


register_backend(FSDP1Backend())
