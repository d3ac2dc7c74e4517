"""Where the elements of every layer live, and over which processes a layer's sums are added.

An optimizer is stepped with *local tensors*: whole parameters on one process, a flat fp32 partition under ZeRO. A
`Layout` says which runs of those tensors belong to which layer of the model. That is all a layer-wise algorithm needs
to know about sharding; who produced the layout (a *backend*) stays behind this file.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist

__all__ = ["Backend", "Layer", "Layout", "LayoutError", "Shard", "local_part", "register_backend", "resolve_layout"]


class LayoutError(RuntimeError):
    """Local tensors that no backend can explain, or a layout that does not cover its layers exactly once."""


@dataclass(frozen=True)
class Layer:
    """One parameter tensor of the model.

    Attributes:
        name: The parameter's name, or "group.index" where no names were given.
        shape: The whole layer's shape, never the shard's (`ds_shape` under ZeRO-3).
        tensor: Index into `Layout.tensors` of the local tensor that carries the layer, on ranks without a shard too.
        parameter: The model's own parameter, where the backend knows it.
    """

    name: str
    shape: tuple[int, ...]
    tensor: int
    parameter: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A contiguous run of one layer's elements inside the local tensor that carries the layer.

    Attributes:
        layer: Index into `Layout.layers`.
        start: First element inside the local tensor, counted over its flattened elements.
        offset: First element inside the layer. Zero under DTensor, where the elements of a shard need not be a run
            of the layer (Shard(1)): sums over layers do not need it, those over rows do.
        length: Number of elements, at least 1.
    """

    layer: int
    start: int
    offset: int
    length: int


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
        clips_with: Set where the wrapper clips gradients itself: the setting to use instead of an optimizer's own.
        gradient_norm: Set where one `step()` call does not see the whole model: returns the L2 norm of the whole
            model's gradient as it reaches `step()`, after clipping.
    """

    backend: str
    tensors: tuple[torch.Tensor, ...]
    groups: tuple[int, ...]
    layers: tuple[Layer, ...]
    shards: tuple[Shard, ...]
    reductions: tuple[tuple[dist.ProcessGroup, tuple[int, ...]], ...] = ()
    clips_with: str | None = None
    gradient_norm: Callable[[], torch.Tensor] | None = None

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
        for process_group, layers in self.reductions:
            if dist.get_world_size(process_group) == 1:
                continue
            columns: Any = slice(None)
            if len(layers) < len(self.layers):
                columns = torch.tensor(layers, device=sums.device)
                if layer_of_column is not None:
                    columns = torch.isin(layer_of_column, columns)
            packed = sums[:, columns].to(reduction_device(process_group, sums.device)).contiguous()
            dist.all_reduce(packed, group=process_group)
            sums[:, columns] = packed.to(sums.device)
        return sums

    def prove(self) -> None:
        """Check, with one collective, that the shards of all ranks cover each layer exactly.

        Raises:
            LayoutError: On every rank alike, naming the layers whose shard lengths do not add up to their size.
        """
        found = torch.zeros(1, len(self.layers), dtype=torch.float64, device=self.device)
        for shard in self.shards:
            found[0, shard.layer] += shard.length
        lengths = self.reduce(found)[0].tolist()
        wrong = [
            f"{layer.name} {layer.shape}: {int(length)} of {layer.numel} elements"
            for layer, length in zip(self.layers, lengths, strict=True)
            if length != layer.numel
        ]
        if wrong:
            raise LayoutError(
                f"{self.backend}: the shards found on all ranks do not add up to the layers: {_listing(wrong)}. "
                "Build the optimizer on the model's current parameters before it is wrapped; if it was, please report "
                "the wrapper and its version."
            )


class Backend(Protocol):
    """What a sharding wrapper's integration provides (one file in integrations/)."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Tell the wrapper that this optimizer class is safe with it. Called when an optimizer is constructed."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout of the (group index, local tensor) pairs, or None if this wrapper did not make them."""


@dataclass
class _Backends:
    registered: list[Backend] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)

    def load(self) -> list[Backend]:
        """Import the backends of those wrappers that the program has imported, and return all known backends."""
        for entry_point in entry_points(group="trustratio.backends"):
            if entry_point.name in sys.modules and entry_point.name not in self.tried:
                self.tried.add(entry_point.name)
                try:
                    entry_point.load()
                except ImportError as error:
                    warnings.warn(f"trustratio cannot use {entry_point.name}: {error}", stacklevel=4)
        return self.registered


_backends = _Backends()


def register_backend(backend: Backend) -> None:
    """Add a backend; `step()` asks it about tensors that are not the optimizer's own parameters."""
    _backends.registered.append(backend)


def admit(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Make the class acceptable to every wrapper that is imported."""
    for backend in _backends.load():
        backend.admit(optimizer_class)


def resolve_layout(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout:
    """Find and prove the layout of the local tensors of one `step()` call.

    Args:
        optimizer: The layer-wise optimizer; it knows which parameters its constructor was given.
        tensors: (index into `optimizer.param_groups`, local tensor) pairs.

    Raises:
        LayoutError: If no backend explains the tensors, or the shards do not add up.
    """
    for backend in _backends.load():
        layout = backend.explain(optimizer, tensors)
        if layout is not None:
            layout.prove()
            return layout
    return _whole_parameters(optimizer, tensors)


def _whole_parameters(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout:
    """The layout of unwrapped and DDP training: every layer is whole here, and nothing is reduced."""
    refuse_strangers(optimizer, [tensor for _, tensor in tensors])
    whole = [(group, tensor) for group, tensor in tensors if tensor.numel()]
    names = dict(name_layers(optimizer, tensors))
    return Layout(
        backend="unsharded",
        tensors=tuple(tensor for _, tensor in whole),
        groups=tuple(group for group, _ in whole),
        layers=tuple(Layer(names[id(tensor)], tuple(tensor.shape), i, tensor) for i, (_, tensor) in enumerate(whole)),
        shards=tuple(Shard(i, 0, 0, tensor.numel()) for i, (_, tensor) in enumerate(whole)),
    )


def refuse_strangers(optimizer: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if any of the tensors is not known to be a whole layer of the optimizer's."""
    strangers = [description for tensor in tensors for description in _why_not_whole(optimizer, tensor)]
    if strangers:
        raise LayoutError(
            f"cannot compute exact trust ratios for {_listing(strangers)}. Supported: parameters handed to the "
            "optimizer's constructor (also under DDP), DeepSpeed ZeRO stages 1, 2 and 3, and FSDP2 (fully_shard). "
            "Construct the optimizer with the model's own parameters and pass that object to the wrapper."
        )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of the tensor lies on this rank: of a DTensor its local tensor, else the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def placements_of(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """How a DTensor is cut, None for any other tensor."""
    return getattr(tensor, "placements", None)


def name_layers(optimizer: Any, parameters: Sequence[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, str]]:
    """Yield (id, name) of each parameter: the name it was given, else "group.index"."""
    position: dict[int, int] = {}
    for group, parameter in parameters:
        index = position[group] = position.get(group, -1) + 1
        yield id(parameter), optimizer.parameter_name(parameter) or f"{group}.{index}"


def _why_not_whole(optimizer: Any, tensor: torch.Tensor) -> Iterator[str]:
    described = f"a {type(tensor).__name__} of shape {tuple(tensor.shape)}"
    if not optimizer.was_given(tensor):
        yield f"{described} that the constructor was not given"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        yield f"{described} (a tensor subclass)"
    elif getattr(tensor, "_fsdp_flattened", False):
        yield f"{described} that FSDP1 has flattened"
    elif getattr(tensor, "tensor_model_parallel", False) and dist.is_initialized() and dist.get_world_size() > 1:
        yield f"{described} that is cut by tensor parallelism"


def _listing(items: Sequence[str], shown: int = 5) -> str:
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + rest


def reduction_device(process_group: dist.ProcessGroup, preferred: torch.device) -> torch.device:
    """Where the group's collectives work: `preferred`, or its own device when NCCL meets offloaded CPU state."""
    supported = process_group._device_types
    if any(device.type == preferred.type for device in supported):
        return preferred
    if supported[0].type == "cpu":
        return torch.device("cpu")
    return torch.device(supported[0].type, torch.accelerator.current_device_index())
