"""The gradients that a step reads: dense, contiguous, of this rank's part, complete.

Tensor parallelism may leave a gradient as a sum over ranks that nobody has added up yet (`Partial`): each rank has the
part of its own tokens, as for norms under sequence parallelism. All of them are added up together, with one all-reduce
per process group and dtype. A rank whose tokens reach no part of a layer adds zeros; that not one of them reaches any
layer is not provided for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..sharding.layout import Layout, LayoutError
from ..sharding.local_tensors import is_plain, local_part, placements_of, reduction_device
from .storage_order import as_it_lies, in_the_order_of

__all__ = ["read_gradients", "version_of"]


def version_of(gradient: torch.Tensor) -> int:
    """How often torch has changed a tensor in place: what was known of it is of one version.

    FSDP2 writes into a DTensor's local part without the DTensor's own version rising; torch's foreach functions write
    into it without any rising.
    """
    local = local_part(gradient)
    return gradient._version if local is gradient else gradient._version + local._version


def read_gradients(layout: Layout, as_they_lie: Collection[int] = ()) -> list[torch.Tensor | None]:
    """Return the gradient of each local tensor on this rank, None where there is none.

    Args:
        layout: Of the step.
        as_they_lie: Indices of local tensors that are wanted as vectors, in the order of the tensor's memory.

    Raises:
        LayoutError: If one of a parameter and its gradient is a DTensor and the other is not, or if a gradient has not
            the shape of its tensor; compiled sweeps would read beyond its end.
        RuntimeError: If a gradient is sparse.
    """
    gradients: list[torch.Tensor | None] = []
    sums: dict[tuple[dist.ProcessGroup, torch.dtype], set[int]] = {}
    for index, tensor in enumerate(layout.tensors):
        gradient = tensor.grad
        if gradient is None:
            gradients.append(None)
            continue
        if is_plain(tensor) and is_plain(gradient):  # nearly all; the general way takes its time
            gradients.append(_like(layout, index, gradient, tensor, as_it_is=index in as_they_lie))
            continue
        if placements_of(gradient) != placements_of(tensor):
            # A plain sum waits for the others below; what is cut in another way is cut anew at once.
            _check_kind(layout, index, gradient)
            process_group = _sum_over(gradient, tensor)
            if process_group is None:
                gradient = gradient.redistribute(placements=placements_of(tensor))  # type: ignore[attr-defined]
            else:
                sums.setdefault((process_group, gradient.dtype), set()).add(index)
        gradients.append(_like(layout, index, local_part(gradient), local_part(tensor)))
    for (process_group, dtype), indices in sums.items():
        indices.update(_lacking(process_group, dtype, layout.tensors))
        _add(process_group, layout.tensors, gradients, sorted(indices))
    return gradients


def _like(
    layout: Layout, index: int, gradient: torch.Tensor, tensor: torch.Tensor, *, as_it_is: bool = False
) -> torch.Tensor:
    """The local gradient, contiguous or in the order of the tensor's memory, if it fits the local tensor."""
    gradient = _dense(gradient)
    if gradient.shape != tensor.shape:
        raise LayoutError(
            f"the gradient of {_name_of(layout, index)} has shape {tuple(gradient.shape)}, but the parameter has "
            f"{tuple(tensor.shape)}: after giving a parameter other data, call zero_grad() and backward() before "
            "step(), and build a new optimizer if its shape changes after the first step; under FSDP1, run the last "
            "backward() of a step outside no_sync()"
        )
    return as_it_lies(in_the_order_of(gradient, tensor)) if as_it_is else gradient.contiguous()


def _check_kind(layout: Layout, index: int, gradient: torch.Tensor) -> None:
    tensor = layout.tensors[index]
    if (placements_of(gradient) is None) != (placements_of(tensor) is None):
        raise LayoutError(
            f"parameter {_name_of(layout, index)} is a {type(tensor).__name__} and its gradient a "
            f"{type(gradient).__name__}, of which one is cut by placements and the other is not: assign a gradient "
            "like the parameter, as distribute_tensor and DTensor.from_local make"
        )


def _name_of(layout: Layout, index: int) -> str:
    return next((layer.name for layer in layout.layers if layer.tensor == index), f"tensor {index}")


def _lacking(process_group: dist.ProcessGroup, dtype: torch.dtype, tensors: Sequence[torch.Tensor]) -> Iterator[int]:
    """The tensors that have no gradient here, while other ranks of the group may have a part of it."""
    for index, tensor in enumerate(tensors):
        placements = placements_of(tensor)
        if tensor.grad is None and tensor.requires_grad and tensor.dtype == dtype and placements is not None:
            groups = tensor.device_mesh.get_all_groups()  # type: ignore[attr-defined]
            if any(p.is_replicate() and g is process_group for p, g in zip(placements, groups, strict=True)):
                yield index


def _sum_over(gradient: Any, tensor: Any) -> dist.ProcessGroup | None:
    """The ranks over which a gradient is a plain sum and otherwise cut like its tensor; None for any other case."""
    differing = [
        (dimension, placement)
        for dimension, (placement, wanted) in enumerate(zip(gradient.placements, tensor.placements, strict=True))
        if placement != wanted
    ]
    if len(differing) != 1 or gradient.device_mesh != tensor.device_mesh:
        return None
    ((dimension, placement),) = differing
    is_sum = placement.is_partial() and getattr(placement, "reduce_op", None) == "sum"
    return tensor.device_mesh.get_group(dimension) if is_sum and tensor.placements[dimension].is_replicate() else None


def _add(
    process_group: dist.ProcessGroup,
    tensors: Sequence[torch.Tensor],
    gradients: list[torch.Tensor | None],
    indices: Sequence[int],
) -> None:
    """Complete gradients that are sums over ranks, with zeros for those that this rank has none of."""
    parts = [_zeros(tensors[index]) if (part := gradients[index]) is None else part for index in indices]
    packed = torch.cat([part.view(-1) for part in parts])
    packed = packed.to(reduction_device(process_group, packed.device))
    dist.all_reduce(packed, group=process_group)
    complete = packed.to(parts[0].device).split([part.numel() for part in parts])
    for index, part, gradient in zip(indices, parts, complete, strict=True):
        gradients[index] = gradient.view(part.shape)


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(local_part(tensor), memory_format=torch.contiguous_format)


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"gradients must be dense, got {gradient.layout} of shape {tuple(gradient.shape)}: "
            "build the embedding with sparse=False"
        )
    return gradient
