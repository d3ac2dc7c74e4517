"""Where the elements of every layer live, and over which processes a layer's sums are added.

An optimizer is stepped with *local tensors*: whole parameters on one process, a flat fp32 partition under ZeRO. A
`Layout` says which runs of those tensors belong to which layer of the model. That is all a layer-wise algorithm needs
to know about sharding; who produced the layout (a *backend*, with `LayoutBuilder`) stays behind this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from .local_tensors import local_part, numbers_device, reduction_device
from .memory import shared_memory

__all__ = ["Layer", "Layout", "LayoutError", "Shard", "listing"]


class LayoutError(RuntimeError):
    """Local tensors that no backend can explain, or a layout that does not cover its layers exactly once.

    Attributes:
        not_whole: Descriptions of tensors that are not known to be whole layers, if that is the reason.
    """

    def __init__(self, message: str, not_whole: Sequence[str] = ()):
        super().__init__(message)
        self.not_whole = tuple(not_whole)


@dataclass(frozen=True)
class Layer:
    """One parameter tensor of the model, or one segment of it (see `in_segments`).

    Attributes:
        name: The parameter's name, or "group.index" where no names were given.
        shape: The whole layer's shape, never the shard's (`ds_shape` under ZeRO-3).
        tensor: Index into `Layout.tensors` of the local tensor that carries the layer, on ranks without a shard too.
        parameter: The model's own parameter, where the backend knows it.
        gradient_dtype: In which its gradients are added up, where that is not the parameter's dtype.
    """

    name: str
    shape: tuple[int, ...]
    tensor: int
    parameter: torch.Tensor | None = field(default=None, repr=False, compare=False)
    gradient_dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def gradient_resolution(self) -> float:
        """Of the dtype in which gradients are added up: the relative distance of its neighbouring numbers."""
        return float(self._gradient_numbers.eps)

    @property
    def smallest_gradient(self) -> float:
        """Of the same dtype: its smallest positive number, the distance of neighbouring numbers around zero."""
        return float(self._gradient_numbers.smallest_normal * self._gradient_numbers.eps)

    @property
    def _gradient_numbers(self) -> torch.finfo:
        return torch.finfo(self.gradient_dtype or (torch.float32 if self.parameter is None else self.parameter.dtype))


@dataclass(frozen=True)
class Shard:
    """A part of one layer: a run of elements inside the local tensor that carries the layer.

    Attributes:
        layer: Index into `Layout.layers`.
        start: First element inside the local tensor, counted over its flattened elements.
        offset: First element inside the layer, counted over the whole layer's flattened elements.
        length: Number of elements, at least 1.
        span: Elements of the layer from the shard's first to its last one, 0 for `length`. It is larger where the shard
            is no run of the layer: a block that is narrower than the layer, as Shard(1) of a DTensor makes.
    """

    layer: int
    start: int
    offset: int
    length: int
    span: int = 0

    @property
    def is_run(self) -> bool:
        """Whether the shard's elements are neighbours in the layer too."""
        return self.span in (0, self.length)

    @property
    def end(self) -> int:
        """One more than the position in the layer of the last element."""
        return self.offset + (self.span or self.length)

    @property
    def index_sum(self) -> float:
        """Sum of the elements' positions in the layer; a block is symmetric about the middle of its ends."""
        return self.length * (self.offset + self.end - 1) / 2


@dataclass(frozen=True)
class Layout:
    """Everything a step must know about sharding.

    Attributes:
        backend: Name for messages, e.g. "DeepSpeed ZeRO-2".
        tensors: The local tensors of one `step()` call, in the order of `param_groups`; of a DTensor, its local part
            is meant. What no shard covers is padding: it is never read by a norm and never written.
        groups: For each local tensor, its index into `optimizer.param_groups` during this call; ascending.
        layers: Every layer with at least one element anywhere, the same on all ranks, in the order of their tensors.
        shards: The parts of those layers on this rank, in the order of `tensors`.
        reductions: Process groups over which a layer's sums are added, each with the indices of the layers that are
            cut over it. Empty when every layer is whole on this rank.
        clips_with: Set where an optimizer's own clipping would not see the whole model's gradient, or the wrapper clips
            itself: the setting to use instead.
        gradient_norm: Set where one `step()` call does not see the whole model: returns the L2 norm of the whole
            model's gradient as it reaches `step()`, after clipping.
        placed: Whether the shards' offsets and spans are positions in the whole layer, so that the proof checks them.
        replicas: Process groups whose ranks hold the same of some layers, each with the layers' indices; as far as the
            wrapper that made the layout says so.
        others: Set where every layer is whole on one of several ranks, which step other layers each: those ranks.
        clipped: Set where the wrapper says at a step, without waiting for the device, whether it has clipped gradients.
    """

    backend: str
    tensors: tuple[torch.Tensor, ...]
    groups: tuple[int, ...]
    layers: tuple[Layer, ...]
    shards: tuple[Shard, ...]
    reductions: tuple[tuple[dist.ProcessGroup, tuple[int, ...]], ...] = ()
    clips_with: str | None = None
    gradient_norm: Callable[[], torch.Tensor] | None = None
    placed: bool = False
    replicas: tuple[tuple[dist.ProcessGroup, tuple[int, ...]], ...] = ()
    others: dist.ProcessGroup | None = None
    clipped: Callable[[], bool | torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    @functools.cached_property
    def numbers_device(self) -> torch.device:
        """Where the numbers of layers are, which are fp64: `device`, or the CPU if that has no fp64."""
        return numbers_device(self.device)

    def reduce(
        self, sums: torch.Tensor, layer_of_column: tuple[int, ...] | None = None, *, largest: bool = False
    ) -> torch.Tensor:
        """Add `sums` over all shards of each layer: one all-reduce per process group, however many layers.

        Args:
            sums: fp64, shape (rows, layers), this rank's share.
            layer_of_column: The layer that each column belongs to, where there is not one column per layer; the same
                at every step, since what is made of it is kept.
            largest: Take the largest share in place of the sum, of numbers that are not negative; NaN is the largest.

        Returns:
            The same tensor on every rank of the group, shape (rows, layers).
        """
        for (process_group, _), reduced in zip(self.reductions, self._columns(layer_of_column), strict=True):
            if dist.get_world_size(process_group) == 1:
                continue
            columns: Any = slice(None) if reduced is None else reduced.to(sums.device)
            packed = sums[:, columns].to(reduction_device(process_group, sums.device)).contiguous()
            if largest:
                _take_largest(packed, process_group)
            else:
                dist.all_reduce(packed, group=process_group)
            sums[:, columns] = packed.to(sums.device)
        return sums

    def _columns(self, layer_of_column: tuple[int, ...] | None) -> list[torch.Tensor | None]:
        """The columns of each reduction, on the device, None for all; sent once, as a step must not wait."""
        known = self._known_columns
        if layer_of_column not in known:
            owners = range(len(self.layers)) if layer_of_column is None else layer_of_column
            known[layer_of_column] = [self._columns_over(set(layers), owners) for _, layers in self.reductions]
        return known[layer_of_column]

    def _columns_over(self, layers: set[int], owners: Sequence[int]) -> torch.Tensor | None:
        columns = [column for column, layer in enumerate(owners) if layer in layers]
        if len(columns) == len(owners):
            return None
        return torch.tensor(columns, dtype=torch.long, device=self.numbers_device)

    @functools.cached_property
    def _known_columns(self) -> dict[tuple[int, ...] | None, list[torch.Tensor | None]]:
        return {}

    def numbers_of(self, number: Callable[[Layer], float]) -> torch.Tensor:
        """A number of each layer, shape (layers,), fp64; for what is kept, as sending it waits."""
        return torch.tensor([number(layer) for layer in self.layers], dtype=torch.float64, device=self.numbers_device)

    @functools.cached_property
    def elements(self) -> torch.Tensor:
        """How many each layer has, shape (layers,), fp64."""
        return self.numbers_of(lambda layer: layer.numel)

    @functools.cached_property
    def gradient_resolution(self) -> torch.Tensor:
        """`Layer.gradient_resolution` of each layer, shape (layers,), fp64."""
        return self.numbers_of(lambda layer: layer.gradient_resolution)

    @functools.cached_property
    def smallest_gradient(self) -> torch.Tensor:
        """`Layer.smallest_gradient` of each layer, shape (layers,), fp64."""
        return self.numbers_of(lambda layer: layer.smallest_gradient)

    @functools.cached_property
    def copies(self) -> torch.Tensor:
        """Over how many ranks each layer's sums are added, shape (layers,), fp64: what `reduce` makes of ones."""
        copies = torch.ones(len(self.layers), dtype=torch.float64, device="cpu")
        for process_group, layers in self.reductions:
            copies[list(layers)] *= dist.get_world_size(process_group)
        return copies.to(self.numbers_device)

    def prove(self) -> None:
        """Check, with one collective, that the shards of all ranks cover each layer exactly once.

        On each rank they must lie inside their tensors and have no element in common, in no tensor and, where tensors
        share memory, in no two of them. Over all ranks their lengths must add up to the layer's size and, where
        positions are known, their elements' positions to the sum over all positions: if two ranks hold the same part,
        and nobody the other, the lengths are right.

        Raises:
            LayoutError: On every rank alike, naming the layers that are not covered.
        """
        faults = self._faults_here()
        covered = torch.zeros(3, len(self.layers), dtype=torch.float64, device="cpu")
        for shard in self.shards:
            covered[0, shard.layer] += shard.length
            covered[1, shard.layer] += shard.index_sum
        for index in faults:
            covered[2, index] = 1
        wrong, misplaced = [], []
        lengths, index_sums, faulty = self.reduce(covered).tolist()
        if any(faulty):
            raise LayoutError(self._described(faults, faulty))
        for layer, length, index_sum in zip(self.layers, lengths, index_sums, strict=True):
            expected = layer.numel * (layer.numel - 1) / 2
            if length != layer.numel:
                wrong.append(f"{layer.name} {layer.shape}: {int(length)} of {layer.numel} elements")
            elif self.placed and abs(index_sum - expected) > 1e-9 * expected:
                misplaced.append(f"{layer.name} {layer.shape}")
        if wrong:
            raise LayoutError(
                f"{self.backend}: the shards found on all ranks do not add up to the layers: {listing(wrong)}. "
                "Build the optimizer on the model's current parameters before it is wrapped; if it was, please report "
                "the wrapper and its version."
            )
        if misplaced:
            raise LayoutError(
                f"{self.backend}: ranks hold overlapping parts of {listing(misplaced)}: they disagree about the mesh "
                "or the placements. Make the same mesh, over the same ranks in the same order, on all ranks"
            )

    def _faults_here(self) -> dict[int, str]:
        """What is wrong with the shards on this rank: a sentence for the first such layers, by index."""
        faults: dict[int, str] = {}
        locals_ = [local_part(tensor) for tensor in self.tensors]
        for shard, following in zip_longest(self.shards, self.shards[1:]):
            layer, end = self.layers[shard.layer], shard.start + shard.length
            size = locals_[layer.tensor].numel()
            if shard.start < 0 or end > size:
                faults[shard.layer] = f"{layer.name} is at [{shard.start}, {end}) of a tensor of {size} elements"
            elif following and layer.tensor == self.layers[following.layer].tensor and following.start < end:
                other = self.layers[following.layer].name
                faults[shard.layer] = f"{layer.name} and {other} overlap in one tensor"
        first_layer = {layer.tensor: index for index, layer in reversed(list(enumerate(self.layers)))}
        for first, second in shared_memory(locals_):
            one, two = first_layer[first], first_layer[second]
            if self.tensors[first] is self.tensors[second] and first != second:
                faults[two] = f"{self.layers[two].name} was given twice"
            elif first == second:
                faults[two] = f"{self.layers[two].name} has elements that share memory with each other"
            else:
                faults[two] = f"{self.layers[two].name} lies in the memory of {self.layers[one].name}"
        return faults

    def _described(self, faults: Mapping[int, str], faulty: Sequence[float]) -> str:
        """The message for faults of any rank, of which `faulty` has the layers."""
        found = list(faults.values()) or [
            f"{layer.name}, on another rank" for layer, bad in zip(self.layers, faulty, strict=True) if bad
        ]
        return (
            f"{self.backend}: what this process is to step overlaps, so that elements would be updated twice: "
            f"{listing(found)}. Tie layers by using one Parameter object for both, clone() an expanded tensor before "
            "making it a parameter, and leave the data of parameters where it is once a wrapper has them"
        )


def _take_largest(numbers: torch.Tensor, process_group: dist.ProcessGroup) -> None:
    """Replace each fp64 number that is not negative by the largest of all ranks', in place.

    The bits of such numbers are in the order of the numbers, with NaN above infinity. As numbers, backends lose NaN.
    """
    numbers.abs_()  # NaN has a sign too
    dist.all_reduce(numbers.view(torch.int64), op=dist.ReduceOp.MAX, group=process_group)


def listing(items: Sequence[str], shown: int = 5) -> str:
    """The first of the items for a message, and how many there are besides."""
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + rest
