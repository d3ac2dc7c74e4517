"""Layers that tensor parallelism cuts: what DeepSpeed's AutoTP and Megatron-style layers say about themselves.

Both mark a parameter of which a rank has only a part, and leave those that every rank has whole unmarked:

    attribute of the parameter              meaning                                           set by
    tensor_model_parallel                   this rank has a part of the layer                 both
    partition_dim                           the dimension that is cut, into equal parts       Megatron
    partition_stride                        how many stacked layers are cut, each on its own  Megatron
    ds_autotp_universal_checkpoint_meta     the whole layer's shape; parts may be unequal     AutoTP
    allreduce (False)                       an expert's, cut over a group of its own          Megatron

The ranks come from an `mpu` ("model parallel unit"): any object with Megatron's functions that return process groups.
A layer's sums are added over those ranks and, where its part is sharded further, over the data-parallel ones; a layer
that every tensor-parallel rank has whole is added over the latter only, so it is counted once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from .layout import Layer, Layout, LayoutError
from .layout_builder import LayoutBuilder
from .local_tensors import reduction_device
from .parts import Part
from .refusals import refuse_rows, refuse_statistics
from .unsharded import is_cut, name_layers, refuse_strangers

__all__ = ["TensorParallel", "layout_of_parameters", "refuse_optimizer"]

AUTOTP_METADATA = "ds_autotp_universal_checkpoint_meta"


@dataclass(frozen=True)
class TensorParallel:
    """Knows which ranks have the other parts of a layer.

    Attributes:
        mpu: An object with Megatron's functions, such as the module megatron.core.parallel_state; None where there is
            no tensor parallelism.
        process_group: The ranks, where there is no `mpu` to ask.
    """

    mpu: Any = None
    process_group: dist.ProcessGroup | None = None

    def ranks(self, expert: bool = False) -> dist.ProcessGroup | None:
        """The ranks among which layers are cut, or those of experts where they have their own; None if not known."""
        names = ("get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group")
        for name in (*(("get_expert_tensor_parallel_group",) if expert else ()), *names):
            find = getattr(self.mpu, name, None)
            if find is not None:
                group: dist.ProcessGroup = find()
                return group
        return self.process_group

    def ranks_of(self, parameter: torch.Tensor) -> dist.ProcessGroup | None:
        """The ranks among which a parameter like this one is cut if it is marked as a part; None if not known."""
        return self.ranks(expert=_is_expert(parameter))

    def size(self, expert: bool = False) -> int:
        """Among how many ranks layers, or experts, are cut; 1 where they are not, or nobody knows."""
        process_group = self.ranks(expert)
        return 1 if process_group is None else dist.get_world_size(process_group)

    def part(self, name: str, parameter: torch.Tensor, shape: tuple[int, ...]) -> Part:
        """What this rank has of a layer.

        Args:
            name: The layer's, for messages.
            parameter: The layer's parameter.
            shape: Shape of this rank's part.

        Raises:
            LayoutError: If the parameter says that it is cut, but not how, or nobody knows over which ranks.
        """
        if not is_cut(parameter):
            return Part.all_of(shape)
        process_group = self.ranks_of(parameter)
        if process_group is None:
            raise LayoutError(
                f"layer {name}, of which this rank has the part {shape}, is cut by tensor parallelism over ranks that "
                "are not known. Call trustratio.integrations.megatron.use_mpu(mpu) before the first step, with the "
                "module or object whose get_tensor_model_parallel_group() returns them"
            )
        metadata = getattr(parameter, AUTOTP_METADATA, None)
        if metadata is not None and metadata["original_shape"] is not None:
            return _autotp_part(metadata, shape, process_group)
        return _megatron_part(name, parameter, shape, process_group)

    def agree(self, layers: Sequence[Layer], cut: Collection[int]) -> None:
        """Check, with two collectives, that the tensor-parallel ranks step the same layers and cut the same of them.

        Args:
            layers: Those of one `step()` call.
            cut: Indices of those that are cut.

        Raises:
            LayoutError: On each of those ranks alike, naming the layers.
        """
        process_group = self.ranks()
        if process_group is None or self.size() == 1:
            return
        if _differ([len(layers)], process_group):
            raise LayoutError(
                f"the tensor-parallel ranks step different numbers of layers, this one {len(layers)}: build the same "
                "model on all of them, and the optimizer from all its parameters"
            )
        said = [repr((_common_name(layer), layer.shape, index in cut)) for index, layer in enumerate(layers)]
        differing = _differ([zlib.crc32(what.encode()) for what in said], process_group)
        different = [layers[index].name for index in differing]
        if different:
            raise LayoutError(
                "the tensor-parallel ranks disagree about the shape of these layers, or about whether they are cut: "
                f"{', '.join(different[:5])}. Mark a layer as cut (tensor_model_parallel) on all of them or on none"
            )


def _megatron_part(
    name: str, parameter: torch.Tensor, shape: tuple[int, ...], process_group: dist.ProcessGroup
) -> Part:
    """Equal parts along `partition_dim`; where the layer is several stacked ones, of each of them."""
    dimension = getattr(parameter, "partition_dim", -1)
    if not 0 <= dimension < len(shape):
        raise LayoutError(
            f"layer {name}, of which this rank has the part {shape}, is cut by tensor parallelism along a dimension "
            f"that is not known: its partition_dim is {dimension}. Set it with "
            "megatron.core.tensor_parallel.set_tensor_model_parallel_attributes, or an attribute of the same name"
        )
    ranks, stacked = dist.get_world_size(process_group), getattr(parameter, "partition_stride", 1)
    whole = tuple(size * ranks if index == dimension else size for index, size in enumerate(shape))
    width = shape[dimension] // stacked
    if width * stacked != shape[dimension]:
        return Part(shape, whole, process_group, dimension)
    firsts = (dist.get_rank(process_group) * width + number * width * ranks for number in range(stacked))
    return Part(shape, whole, process_group, dimension, tuple(range(first, first + width) for first in firsts))


def _autotp_part(metadata: dict[str, Any], shape: tuple[int, ...], process_group: dist.ProcessGroup) -> Part:
    """Parts of the sizes that AutoTP has noted; where the layer is several stacked ones, of each of them."""
    whole, dimension = tuple(metadata["original_shape"]), metadata.get("partition_dim")
    sizes = metadata.get("sub_param_shard_widths") or [metadata.get("partition_sizes")]
    if dimension is None or None in sizes:
        return Part(shape, whole, process_group)
    rank, ranges, first = dist.get_rank(process_group), [], 0
    for of_ranks in sizes:
        bounds = list(accumulate(of_ranks, initial=first))
        ranges.append(range(bounds[rank], bounds[rank + 1]))
        first = bounds[-1]
    if first != whole[dimension] or sum(map(len, ranges)) != shape[dimension]:
        return Part(shape, whole, process_group)
    return Part(shape, whole, process_group, dimension, tuple(ranges))


def _common_name(layer: Layer) -> str | None:
    """The name, unless the layer is an expert's, which need not be the same expert on all ranks."""
    return None if _is_expert(layer.parameter) else layer.name


def _is_expert(parameter: torch.Tensor | None) -> bool:
    """Whether the parameter is an expert's."""
    return not getattr(parameter, "allreduce", True)


def _differ(numbers: Sequence[int], process_group: dist.ProcessGroup) -> list[int]:
    """The positions at which the group's ranks have different numbers: one all-reduce."""
    mine = torch.tensor([numbers, [-number for number in numbers]], dtype=torch.int64, device="cpu")
    largest = mine.to(reduction_device(process_group, mine.device))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    return (largest[0] != -largest[1]).nonzero().flatten().tolist()


def layout_of_parameters(
    backend: str,
    optimizer: Any,
    tensors: Sequence[tuple[int, torch.Tensor]],
    parallel: TensorParallel,
    name_of: Callable[[torch.Tensor], str | None],
    **options: Any,
) -> Layout:
    """The layout of an optimizer that is stepped with the model's own parameters, some of them parts of layers.

    Args:
        backend: Name for messages.
        optimizer: The optimizer.
        tensors: (group index, parameter) pairs.
        parallel: Knows the tensor-parallel ranks.
        name_of: A parameter's name, where it has one.
        options: As of `LayoutBuilder.layout`.
    """
    refuse_strangers(optimizer, [tensor for _, tensor in tensors], parts_are_known=True)
    given_names = name_layers(optimizer, tensors)
    builder = LayoutBuilder(backend)
    for (group, parameter), (_, given_name) in zip(tensors, given_names, strict=True):
        if parameter.numel() or is_cut(parameter):
            name = name_of(parameter) or given_name
            part = parallel.part(name, parameter, tuple(parameter.shape))
            builder.carry(group, parameter)
            builder.add(name, parameter, part, length=parameter.numel())
    parallel.agree(builder.layers, builder.cut)
    return builder.layout(**options)


def refuse_optimizer(backend: str, optimizer: Any, parameters: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if the optimizer needs more of a cut layer than sums over its elements."""
    if not any(map(is_cut, parameters)):
        return
    problem = f"a rank sees that of its parts of the layers that tensor parallelism cuts ({backend})"
    refuse_statistics(optimizer, problem, "data parallelism (DDP or ZeRO) alone")
    refuse_rows(optimizer, f"which is not supported where tensor parallelism cuts layers ({backend})")
