"""Where the elements of every layer live, and over which processes a layer's sums are added.

An optimizer is stepped with *local tensors*: whole parameters on one process, a flat fp32 partition under ZeRO. A
`Layout` says which runs of those tensors belong to which layer of the model. That is all a layer-wise algorithm needs
to know about sharding; who produced the layout (a *backend*) stays behind this file.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .import_watch import call_after_import
from .local_tensors import reduction_device

__all__ = ["Backend", "Layer", "Layout", "LayoutError", "Shard", "register_backend", "resolve_layout"]


class LayoutError(RuntimeError):
    """Local tensors that no backend can explain, or a layout that does not cover its layers exactly once."""


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
        dtype = self.gradient_dtype or (torch.float32 if self.parameter is None else self.parameter.dtype)
        return float(torch.finfo(dtype).eps)


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

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    def reduce(self, sums: torch.Tensor, layer_of_column: torch.Tensor | None = None) -> torch.Tensor:
        """Add `sums` over all shards of each layer: one all-reduce per process group, however many layers.

        Args:
            sums: fp64, shape (rows, layers), this rank's share.
            layer_of_column: The layer that each column belongs to, where there is not one column per layer.

        Returns:
            The same tensor on every rank of the group, shape (rows, layers).
        """
        for (process_group, _), layers in zip(self.reductions, self._reduced_layers, strict=True):
            if dist.get_world_size(process_group) == 1:
                continue
            columns: Any = slice(None)
            if layers is not None:
                columns = layers.to(sums.device)
                if layer_of_column is not None:
                    columns = torch.isin(layer_of_column, columns)
            packed = sums[:, columns].to(reduction_device(process_group, sums.device)).contiguous()
            dist.all_reduce(packed, group=process_group)
            sums[:, columns] = packed.to(sums.device)
        return sums

    @functools.cached_property
    def _reduced_layers(self) -> list[torch.Tensor | None]:
        """The layers of each reduction, on the device, None where they are all; sent once, as a step must not wait."""
        return [
            torch.tensor(layers, device=self.device) if len(layers) < len(self.layers) else None
            for _, layers in self.reductions
        ]

    @functools.cached_property
    def copies(self) -> torch.Tensor:
        """Over how many ranks each layer's sums are added, shape (layers,), fp64: what `reduce` makes of ones."""
        copies = torch.ones(len(self.layers), dtype=torch.float64)
        for process_group, layers in self.reductions:
            copies[list(layers)] *= dist.get_world_size(process_group)
        return copies.to(self.device)

    def prove(self) -> None:
        """Check, with one collective, that the shards of all ranks cover each layer exactly once.

        Their lengths must add up to the layer's size and, where positions are known, their elements' positions to the
        sum over all positions: if two ranks hold the same part, and nobody the other, the lengths are right.

        Raises:
            LayoutError: On every rank alike, naming the layers that are not covered.
        """
        found = torch.zeros(2, len(self.layers), dtype=torch.float64, device=self.device)
        for shard in self.shards:
            found[0, shard.layer] += shard.length
            found[1, shard.layer] += shard.index_sum
        wrong, misplaced = [], []
        for layer, length, index_sum in zip(self.layers, *self.reduce(found).tolist(), strict=True):
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


class Backend(Protocol):
    """What a sharding wrapper's integration provides (one file in integrations/)."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Tell the wrapper that this optimizer class is safe with it. Called when an optimizer is constructed."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout of the (group index, local tensor) pairs, or None if this wrapper did not make them."""


GUARDS = ("accelerate", "transformers.trainer")
"""Wrappers that may train with another optimizer without ever asking ours: their backends say so. So they are needed
also where the wrapper is imported after the optimizer was constructed, while others are asked for at the first step."""


@dataclass
class _Backends:
    registered: list[Backend] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    watching: bool = False

    def watch_for_guards(self) -> None:
        """See to it that guards are loaded whenever their wrapper is imported."""
        if not self.watching:
            self.watching = True
            call_after_import(GUARDS, self._load_guard)

    def load(self) -> list[Backend]:
        """Import the backends of those wrappers that the program has imported, and return all known backends."""
        for entry_point in entry_points(group="trustratio.backends"):
            if entry_point.name in sys.modules:
                self._try(entry_point)
        return self.registered

    def _load_guard(self, wrapper: str) -> None:
        for entry_point in entry_points(group="trustratio.backends", name=wrapper):
            self._try(entry_point)

    def _try(self, entry_point: EntryPoint) -> None:
        if entry_point.name in self.tried:
            return
        self.tried.add(entry_point.name)
        try:
            entry_point.load()
        except ImportError as error:
            warnings.warn(f"trustratio cannot use {entry_point.name}: {error}", stacklevel=5)


_backends = _Backends()


def register_backend(backend: Backend) -> None:
    """Add a backend; `step()` asks it about tensors that are not the optimizer's own parameters."""
    _backends.registered.append(backend)


def admit(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Make the class acceptable to every wrapper that is imported, and have guards wait for those that are not."""
    _backends.watch_for_guards()
    for backend in _backends.load():
        backend.admit(optimizer_class)


def resolve_layout(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout:
    """Find and prove the layout of the local tensors of one `step()` call.

    Args:
        optimizer: The layer-wise optimizer; it knows which parameters its constructor was given.
        tensors: (index into `optimizer.param_groups`, local tensor) pairs.

    Raises:
        LayoutError: If no backend explains the tensors, they are on several devices, or the shards do not add up.
    """
    for backend in _backends.load():
        layout = backend.explain(optimizer, tensors)
        if layout is not None:
            refuse_several_devices(layout)
            layout = in_segments(layout, optimizer.param_groups)
            layout.prove()
            return layout
    layout = whole_parameters(optimizer, tensors)
    refuse_several_devices(layout)
    return in_segments(layout, optimizer.param_groups)


def whole_parameters(
    optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]], backend: str = "unsharded", **options: Any
) -> Layout:
    """The layout of unwrapped and DDP training: every layer is whole here, and nothing is reduced.

    Args:
        optimizer: The optimizer.
        tensors: (group index, parameter) pairs.
        backend: Name for messages.
        options: Further attributes of the layout.

    Raises:
        LayoutError: If a tensor is not known to be a whole layer.
    """
    refuse_strangers(optimizer, [tensor for _, tensor in tensors])
    whole = [(group, tensor) for group, tensor in tensors if tensor.numel()]
    names = dict(name_layers(optimizer, tensors))
    return Layout(
        backend=backend,
        tensors=tuple(tensor for _, tensor in whole),
        groups=tuple(group for group, _ in whole),
        layers=tuple(Layer(names[id(tensor)], tuple(tensor.shape), i, tensor) for i, (_, tensor) in enumerate(whole)),
        shards=tuple(Shard(i, 0, 0, tensor.numel()) for i, (_, tensor) in enumerate(whole)),
        **options,
    )


def segments_of(group: Mapping[str, Any], name: str) -> int:
    """Into how many segments a group's option `segments` cuts the layer of this name."""
    option = group.get("segments") or 1
    if isinstance(option, int):
        return option
    return next((count for pattern, count in option.items() if fnmatchcase(name, pattern)), 1)


def in_segments(layout: Layout, groups: Sequence[Mapping[str, Any]]) -> Layout:
    """Replace each layer that is several matrices in one, stacked along dimension 0, by one layer per matrix.

    Args:
        layout: As the backend sees it: one layer per parameter.
        groups: The options of the groups that `layout.groups` counts.

    Raises:
        ValueError: If dimension 0 of a layer does not divide into its segments.
    """
    counts = [segments_of(groups[layout.groups[layer.tensor]], layer.name) for layer in layout.layers]
    if all(count == 1 for count in counts):
        return layout
    layers: list[Layer] = []
    parts_of: list[range] = []
    for layer, count in zip(layout.layers, counts, strict=True):
        parts_of.append(range(len(layers), len(layers) + count))
        layers.extend(_segments(layer, count))
    shards = [
        part
        for shard in layout.shards
        for part in _cut_shard(shard, parts_of[shard.layer], layers[parts_of[shard.layer].start])
    ]
    reductions = tuple(
        (process_group, tuple(part for layer in indices for part in parts_of[layer]))
        for process_group, indices in layout.reductions
    )
    return replace(layout, layers=tuple(layers), shards=tuple(shards), reductions=reductions)


def _segments(layer: Layer, count: int) -> list[Layer]:
    if count == 1:
        return [layer]
    if not layer.shape or layer.shape[0] % count:
        raise ValueError(f"layer {layer.name} of shape {layer.shape} does not divide into {count} segments")
    shape = (layer.shape[0] // count, *layer.shape[1:])
    return [replace(layer, name=f"{layer.name}[{index}]", shape=shape) for index in range(count)]


def _cut_shard(shard: Shard, parts: range, segment: Layer) -> Iterator[Shard]:
    """Cut a shard where segments meet."""
    if len(parts) == 1:
        yield replace(shard, layer=parts.start)
    elif shard.is_run:
        for number, begin, end in _ranges(shard.offset, shard.end, segment.numel):
            start = shard.start + begin - shard.offset
            yield Shard(parts[number], start, begin - number * segment.numel, end - begin)
    else:
        yield from _cut_block(shard, parts, segment)


def _cut_block(block: Shard, parts: range, segment: Layer) -> Iterator[Shard]:
    """Cut a shard that is narrower than the layer: as many elements in each row, from the same column on."""
    rows_of_segment = segment.shape[0]
    width = segment.numel // rows_of_segment
    first, column = divmod(block.offset, width)
    last = (block.end - 1) // width
    in_row = block.length // (last + 1 - first)
    reach = block.end - block.offset - (last - first) * width
    for number, begin, end in _ranges(first, last + 1, rows_of_segment):
        yield Shard(
            parts[number],
            start=block.start + (begin - first) * in_row,
            offset=(begin - number * rows_of_segment) * width + column,
            length=(end - begin) * in_row,
            span=(end - begin - 1) * width + reach,
        )


def _ranges(begin: int, end: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut [begin, end) at the multiples of `size`: yields (number, begin, end)."""
    for number in range(begin // size, -(-end // size)):
        yield number, max(begin, number * size), min(end, (number + 1) * size)


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


def tensor_parallel_groups(parameter: torch.Tensor) -> list[dist.ProcessGroup]:
    """The process groups over which a parameter like this one is cut, if it is: what backends know."""
    found = []
    for backend in _backends.load():
        describe = getattr(backend, "tensor_parallel_group", None)
        ranks = describe(parameter) if describe is not None else None
        if ranks is not None:
            found.append(ranks)
    return found


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
            "parameters and pass that object to the wrapper."
        )


def refuse_several_devices(layout: Layout) -> None:
    """Raise LayoutError if the local tensors are not all on one device, where a step keeps the layers' numbers."""
    named = {layout.tensors[layer.tensor].device: layer.name for layer in reversed(layout.layers)}
    if len(named) > 1:
        found = " and ".join(f"{name} on {device}" for device, name in named.items())
        raise LayoutError(
            f"the parameters of one optimizer must be on one device, got {found}: move the model to one device before "
            "the first step, or build one optimizer per device"
        )


def name_layers(optimizer: Any, parameters: Sequence[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, str]]:
    """Yield (id, name) of each parameter: the name it was given, else "group.index"."""
    position: dict[int, int] = {}
    for group, parameter in parameters:
        index = position[group] = position.get(group, -1) + 1
        yield id(parameter), optimizer.parameter_name(parameter) or f"{group}.{index}"


def _why_not_whole(optimizer: Any, tensor: torch.Tensor, parts_are_known: bool) -> Iterator[str]:
    name = optimizer.parameter_name(tensor)
    described = f"{name + ', ' if name else ''}a {type(tensor).__name__} of shape {tuple(tensor.shape)}"
    if not optimizer.was_given(tensor):
        yield f"{described} that the constructor was not given"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        yield f"{described} (a tensor subclass)"
    elif getattr(tensor, "_fsdp_flattened", False):
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


def listing(items: Sequence[str], shown: int = 5) -> str:
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + rest
