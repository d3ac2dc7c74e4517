"""Tensors that are whole layers: the layout of one process and of DDP, and the refusal of all that only looks whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .backends import tensor_parallel_groups
from .layout import Layout, LayoutError, listing
from .layout_builder import LayoutBuilder
from .local_tensors import is_flattened, is_plain
from .parts import Part

__all__ = [
    "has_its_own_parameters",
    "is_cut",
    "may_be_cut",
    "name_layers",
    "refuse_strangers",
    "whole_parameters",
]


def whole_parameters(
    optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]], backend: str = "unsharded", **options: Any
) -> Layout:
    """The layout of unwrapped and DDP training: every layer is whole here, and nothing is reduced.

    Args:
        optimizer: The optimizer.
        tensors: (group index, parameter) pairs.
        backend: Name for messages.
        options: As of `LayoutBuilder.layout`.

    Raises:
        LayoutError: If a tensor is not known to be a whole layer.
    """
    refuse_strangers(optimizer, [tensor for _, tensor in tensors])
    builder = LayoutBuilder(backend)
    for (group, parameter), (_, name) in zip(tensors, name_layers(optimizer, tensors), strict=True):
        if parameter.numel():
            builder.carry(group, parameter)
            builder.add(name, parameter, Part.all_of(parameter.shape), length=parameter.numel())
    return builder.layout(**options)


def has_its_own_parameters(optimizer: Any) -> bool:
    """Whether the optimizer has the parameters that it was given. A wrapper that steps others leaves it none of them.

    Cheap, so it is asked before anybody looks for such a wrapper.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return bool(tensors) and all(map(optimizer.was_given, tensors))


def is_cut(parameter: torch.Tensor) -> bool:
    """Whether the parameter is marked as a part of a layer of which tensor parallelism has put others on other ranks.

    Megatron's layers are marked on a single rank too; see `may_be_cut`.
    """
    return bool(getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "model_parallel", False))


def may_be_cut(parameter: torch.Tensor) -> bool:
    """Whether the parameter is marked as a part, and no backend knows that the part is all there is."""
    if not (is_cut(parameter) and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    return not any(dist.get_world_size(ranks) == 1 for ranks in tensor_parallel_groups(parameter))


def refuse_strangers(optimizer: Any, tensors: Sequence[torch.Tensor], *, parts_are_known: bool = False) -> None:
    """Raise LayoutError if any of the tensors is not known to be a whole layer of the optimizer's.

    Args:
        optimizer: The optimizer.
        tensors: What it steps.
        parts_are_known: Whether the caller explains parameters that are marked as parts of layers.
    """
    strangers = [why for tensor in tensors for why in _why_not_whole(optimizer, tensor, parts_are_known)]
    if strangers:
        raise LayoutError(
            f"cannot compute exact trust ratios for {listing(strangers)}. Supported: parameters handed to the "
            "optimizer's constructor (also under DDP), DeepSpeed ZeRO stages 1, 2 and 3, FSDP1 with "
            "use_orig_params=True, FSDP2 (fully_shard), tensor parallelism by DTensor and by Megatron, and Megatron's "
            "DistributedOptimizer; one kind of wrapper per optimizer. Construct the optimizer with the model's own "
            "parameters and pass that object to the wrapper; one that takes another's place comes in by "
            "add_param_group, and its state after that.",
            not_whole=strangers,
        )


def name_layers(optimizer: Any, parameters: Sequence[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, str]]:
    """Yield (id, name) of each parameter: the name it was given, else "group.index"."""
    # In the group, of which frozen parameters may be left out here.
    positions = {id(p): index for group in optimizer.param_groups for index, p in enumerate(group["params"])}
    for group, parameter in parameters:
        yield id(parameter), optimizer.parameter_name(parameter) or f"{group}.{positions[id(parameter)]}"


def _why_not_whole(optimizer: Any, tensor: torch.Tensor, parts_are_known: bool) -> Iterator[str]:
    name = optimizer.parameter_name(tensor)
    described = f"{name + ', ' if name else ''}a {type(tensor).__name__} of shape {tuple(tensor.shape)}"
    if not optimizer.was_given(tensor):
        yield f"{described} that the constructor was not given"
    elif not is_plain(tensor):
        yield f"{described} (a tensor subclass)"
    elif is_flattened(tensor):
        yield f"{described} that FSDP1 has flattened"
    elif hasattr(tensor, "_st_info"):
        yield (
            f"{described} that DistributedDataParallel has made of a DTensor's part (use fully_shard in its place, "
            "which keeps DTensors)"
        )
    elif not parts_are_known and may_be_cut(tensor):
        yield (
            f"{described} that is cut by tensor parallelism over ranks that are not known "
            "(tell them with trustratio.integrations.megatron.use_mpu)"
        )
