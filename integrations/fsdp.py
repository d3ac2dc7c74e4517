"""FSDP2 (`fully_shard`), HSDP and every other use of DTensor: where the layers are on a device mesh.

A DTensor is one layer. Its placements say what each dimension of its mesh does with it:

    placement                               this rank holds              the layer's sums are added
    Replicate                               the same as its neighbours   not over this dimension
    Shard, along any dimension of a layer   its part, which may be empty over this dimension's process group
    Partial                                 a summand of the weights     refused

HSDP is (Replicate, Shard(0)) on a mesh of two dimensions. A layer that is cut over both dimensions is summed over one
and then over the other. State is made of DTensors with the parameter's placements, so that
torch.distributed.checkpoint knows how to save it; the arithmetic is done on local tensors.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trustratio.optimizers.layout import (
    Layer,
    Layout,
    LayoutError,
    Shard,
    local_part,
    name_layers,
    refuse_strangers,
    register_backend,
)

__all__ = ["DTensorBackend"]

BACKEND = "FSDP2 (DTensor)"


class DTensorBackend:
    """Explains DTensor parameters, whoever made them, and plain parameters beside them."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Do nothing: any optimizer may be stepped with DTensors."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout if any of the tensors is a DTensor.

        The constructor need not have been given them: accelerate makes the optimizer first, and replaces its
        parameters by their DTensors.

        Raises:
            LayoutError: If the optimizer cannot be exact, or a parameter is of a kind that is not supported.
        """
        if not any(isinstance(tensor, DTensor) for _, tensor in tensors):
            _refuse_parameters_from_before(tensors)
            return None
        refuse_strangers(optimizer, [tensor for _, tensor in tensors if not isinstance(tensor, DTensor)])
        _refuse_optimizer(optimizer)
        present = [(group, tensor) for group, tensor in tensors if tensor.numel()]
        names = _names(optimizer, tensors)
        for _, tensor in present:
            _refuse_kind(names[id(tensor)], tensor)
        lengths = [local_part(tensor).numel() for _, tensor in present]
        return Layout(
            backend=BACKEND,
            tensors=tuple(tensor for _, tensor in present),
            groups=tuple(group for group, _ in present),
            layers=tuple(
                Layer(names[id(tensor)], tuple(tensor.shape), i, tensor) for i, (_, tensor) in enumerate(present)
            ),
            shards=tuple(Shard(i, 0, 0, length) for i, length in enumerate(lengths) if length),
            reductions=_reductions([tensor for _, tensor in present]),
        )


def _names(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> dict[int, str]:
    """Each parameter's name by id; where it was put in place of another, that one's."""
    names = dict(name_layers(optimizer, tensors))
    for group in optimizer.param_groups:
        given = group.get("param_names") or ()
        if len(given) == len(group["params"]):
            names.update({id(p): name for p, name in zip(group["params"], given, strict=True)})
    return names


def _reductions(tensors: Sequence[torch.Tensor]) -> tuple[tuple[dist.ProcessGroup, tuple[int, ...]], ...]:
    """The process groups of the mesh dimensions that cut a layer. Meshes over the same ranks share one group."""
    cut: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[int]]] = {}
    for index, tensor in enumerate(tensors):
        for process_group in _cut_over(tensor):
            ranks = tuple(dist.get_process_group_ranks(process_group))
            cut.setdefault(ranks, (process_group, []))[1].append(index)
    return tuple((process_group, tuple(indices)) for process_group, indices in cut.values())


def _cut_over(tensor: torch.Tensor) -> Iterator[dist.ProcessGroup]:
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                yield tensor.device_mesh.get_group(dimension)


# Refusals -----------------------------------------------------------------------------------------------------------


def _refuse_optimizer(optimizer: Any) -> None:
    name = type(optimizer).__name__
    if optimizer.statistics is not None:
        raise LayoutError(
            f"{name} needs the gradient of every single micro-batch on every rank, which {BACKEND} reduces before "
            "anybody sees it: not supported. Use DDP or DeepSpeed ZeRO for CLARS, the VR optimizers and "
            "collect_group_norms()"
        )
    if any(optimizer.has_rows(group) for group in optimizer.param_groups):
        raise LayoutError(
            f"{name} clips rows of embeddings, which is not supported under {BACKEND}: use DDP or DeepSpeed ZeRO, or "
            "put the embeddings into a group with cowclip=False"
        )


def _refuse_kind(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, DTensor):
        return
    partial = [placement for placement in tensor.placements if placement.is_partial()]
    if partial:
        raise LayoutError(
            f"parameter {name} has placements {tensor.placements}: no rank knows its weights, which are sums over "
            "ranks. Redistribute it to Shard or Replicate"
        )
    local = local_part(tensor)
    if type(local) not in (torch.Tensor, torch.nn.Parameter):
        raise LayoutError(f"parameter {name} is a DTensor of {type(local).__name__}: not supported")
    if tensor.device_mesh.get_coordinate() is None:
        raise LayoutError(f"parameter {name} lies on {tensor.device_mesh}, which this rank is not part of")


def _refuse_parameters_from_before(tensors: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Raise if the optimizer was made before `fully_shard`, which replaces parameters and tells nobody."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    module_class = getattr(fsdp, "FSDPModule", None)
    if module_class is None or not tensors or any(tensor.grad is not None for _, tensor in tensors):
        return
    shapes = Counter(tensor.shape for _, tensor in tensors)
    for candidate in gc.get_objects():
        # type() rather than isinstance(), which would run the __class__ property of foreign proxy objects.
        if issubclass(type(candidate), module_class) and shapes <= Counter(p.shape for p in candidate.parameters()):
            raise LayoutError(
                "no parameter of the optimizer has a gradient, and fully_shard has sharded a "
                f"{type(candidate).__name__} with parameters of the same shapes: it replaces them, so make the "
                "optimizer from model.parameters() after fully_shard"
            )


register_backend(DTensorBackend())
