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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.layout import Layer, Layout, LayoutError, Shard
from trustratio.optimizers.sharding.local_tensors import reduction_device
from trustratio.optimizers.sharding.unsharded import is_cut, name_layers, refuse_strangers

__all__ = ["Part", "Reductions", "TensorParallel", "layout_of_parameters", "refuse_optimizer"]

AUTOTP_METADATA = "ds_autotp_universal_checkpoint_meta"


@dataclass(frozen=True)
class Part:
    """What this rank has of a layer.

    Attributes:
        shape: Its own shape.
        whole: The whole layer's shape.
        process_group: The ranks that have the other parts; None where the part is the layer.
        dimension: Along which the layer is cut.
        ranges: The indices along that dimension which the part has, in its order; None where they are not known.
    """

    shape: tuple[int, ...]
    whole: tuple[int, ...]
    process_group: dist.ProcessGroup | None = None
    dimension: int = 0
    ranges: tuple[range, ...] | None = None

    @property
    def is_placed(self) -> bool:
        """Whether the positions of its elements in the layer are known."""
        return self.process_group is None or self.ranges is not None

    def shards(self, layer: int, start: int, offset: int, length: int) -> Iterator[Shard]:
        """Where `length` elements of the flattened part, from `offset` on, lie in the layer.

        Where that is not known, the shard counts from the part's first element: sums are right, and checkpoints refuse.

        Args:
            layer: Index of the layer.
            start: The first of these elements in the local tensor.
            offset: The first of them in the part.
            length: Their number, at least 1.
        """
        if self.process_group is None or self.ranges is None:
            yield Shard(layer, start, offset, length)
            return
        inner = prod(self.whole[self.dimension + 1 :])
        row, pitch = (shape[self.dimension] * inner for shape in (self.shape, self.whole))
        at, end = offset, offset + length
        while at < end:
            index, inside = divmod(at, row)
            run, position = self._run_at(inside, inner)
            rows = 1
            if inside == 0 and run == row and self.dimension == 1:
                rows = max(1, (end - at) // row)  # whole rows of one run each are one block
            count = min(run + (rows - 1) * row, end - at)
            span = count + (rows - 1) * (pitch - row)
            yield Shard(layer, start + at - offset, index * pitch + position, count, span)
            at += count

    def _run_at(self, inside: int, inner: int) -> tuple[int, int]:
        """How many elements follow one another in the layer from an element of the part's row on, and its position."""
        assert self.ranges is not None
        for indices in self.ranges:
            size = len(indices) * inner
            if inside < size:
                return size - inside, indices.start * inner + inside
            inside -= size
        raise AssertionError("the part is larger than its ranges")


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
                return find()
        return self.process_group

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
            return Part(shape, shape)
        process_group = self.ranks(expert=not getattr(parameter, "allreduce", True))
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
    return layer.name if getattr(layer.parameter, "allreduce", True) else None


def _differ(numbers: Sequence[int], process_group: dist.ProcessGroup) -> list[int]:
    """The positions at which the group's ranks have different numbers: one all-reduce."""
    mine = torch.tensor([numbers, [-number for number in numbers]], dtype=torch.int64)
    largest = mine.to(reduction_device(process_group, mine.device))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    return (largest[0] != -largest[1]).nonzero().flatten().tolist()


@dataclass
class Reductions:
    """Collects `Layout.reductions`: the layers to be added over each process group, in the order of first use."""

    _groups: dict[int, tuple[dist.ProcessGroup, list[int]]] = field(default_factory=dict)

    def add(self, process_group: dist.ProcessGroup, layer: int) -> None:
        """Add one layer's sums over the group."""
        self._groups.setdefault(id(process_group), (process_group, []))[1].append(layer)

    def collected(self) -> tuple[tuple[dist.ProcessGroup, tuple[int, ...]], ...]:
        """What `Layout.reductions` wants."""
        return tuple((process_group, tuple(layers)) for process_group, layers in self._groups.values())


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
        options: Further attributes of the layout.
    """
    refuse_strangers(optimizer, [tensor for _, tensor in tensors], parts_are_known=True)
    present = [(group, tensor) for group, tensor in tensors if tensor.numel() or is_cut(tensor)]
    given = name_layers(optimizer, tensors)
    names = {id(p): name_of(p) or name for (_, p), (_, name) in zip(tensors, given, strict=True)}
    layers: list[Layer] = []
    shards: list[Shard] = []
    cut: set[int] = set()
    placed = True
    reductions = Reductions()
    for index, (_, tensor) in enumerate(present):
        part = parallel.part(names[id(tensor)], tensor, tuple(tensor.shape))
        layers.append(Layer(names[id(tensor)], part.whole, index, tensor))
        placed = placed and part.is_placed
        if tensor.numel():
            shards.extend(part.shards(index, 0, 0, tensor.numel()))
        if part.process_group is not None:
            cut.add(index)
            reductions.add(part.process_group, index)
    parallel.agree(layers, cut)
    return Layout(
        backend=backend,
        tensors=tuple(tensor for _, tensor in present),
        groups=tuple(group for group, _ in present),
        layers=tuple(layers),
        shards=tuple(shards),
        reductions=reductions.collected(),
        placed=placed,
        **options,
    )


def refuse_optimizer(backend: str, optimizer: Any, parameters: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if the optimizer needs more of a cut layer than sums over its elements."""
    cut = [parameter for parameter in parameters if is_cut(parameter)]
    if not cut:
        return
    name = type(optimizer).__name__
    if optimizer.statistics is not None:
        raise LayoutError(
            f"{name} needs norms of every micro-batch's gradient, of which a rank sees only its parts of the layers "
            f"that tensor parallelism cuts ({backend}): not supported. Use data parallelism (DDP or ZeRO) alone for "
            "CLARS, the VR optimizers and collect_group_norms()"
        )
    with_rows = [group for group in optimizer.param_groups if optimizer.has_rows(group)]
    if with_rows:
        raise LayoutError(
            f"{name} clips rows of embeddings, which is not supported where tensor parallelism cuts layers "
            f"({backend}): put the embeddings into a group with cowclip=False"
        )
