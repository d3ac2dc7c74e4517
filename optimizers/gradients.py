"""The gradients that a step reads: dense, contiguous, of this rank's part, complete.

Tensor parallelism may leave a gradient as a sum over ranks that nobody has added up yet (`Partial`): each rank has the
part of its own tokens, as for norms under sequence parallelism. All of them are added up together, with one all-reduce
per process group and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .layout import Layout, LayoutError, is_plain, local_part, placements_of, reduction_device

__all__ = ["read_gradients"]


def read_gradients(layout: Layout) -> list[torch.Tensor | None]:
    """Return the gradient of each local tensor on this rank, None where there is none.

    Raises:
        RuntimeError: If a gradient is sparse.
        LayoutError: If a gradient has not as many elements as its tensor; compiled sweeps would read beyond its end.
    """
    gradients: list[torch.Tensor | None] = []
    partial: dict[tuple[Any, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(layout.tensors):
        gradient = tensor.grad
        if gradient is None:
            gradients.append(None)
            continue
        if is_plain(tensor) and is_plain(gradient):  # nearly all; the general way takes its time
            gradients.append(_like(layout, index, gradient, tensor))
            continue
        missing = None
        if placements_of(gradient) != placements_of(tensor):
            missing = _sum_over(gradient, tensor)
            if missing is None:
                gradient = gradient.redistribute(placements=placements_of(tensor))  # type: ignore[attr-defined]
        if missing is not None:
            partial.setdefault((missing, gradient.dtype), []).append(index)
        gradients.append(_like(layout, index, local_part(gradient), local_part(tensor)))
    for (process_group, _), indices in partial.items():
        _add(process_group, gradients, indices)
    return gradients


def _like(layout: Layout, index: int, gradient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The local gradient, contiguous, if it fits the local tensor."""
    gradient = _dense(gradient)
    if gradient.shape != tensor.shape:
        name = next((layer.name for layer in layout.layers if layer.tensor == index), f"tensor {index}")
        raise LayoutError(
            f"the gradient of {name} has shape {tuple(gradient.shape)}, but the parameter has {tuple(tensor.shape)}: "
            "after giving a parameter other data, call zero_grad() and backward() before step(), and build a new "
            "optimizer if its shape changes after the first step"
        )
    return gradient.contiguous()


def _sum_over(gradient: Any, tensor: Any) -> dist.ProcessGroup | None:
    """The ranks over which a gradient is a plain sum and otherwise cut like its tensor; None for any other case."""
    differing = [
        (dimension, found)
        for dimension, (found, wanted) in enumerate(zip(gradient.placements, tensor.placements, strict=True))
        if found != wanted
    ]
    if len(differing) != 1 or gradient.device_mesh != tensor.device_mesh:
        return None
    ((dimension, found),) = differing
    is_sum = found.is_partial() and getattr(found, "reduce_op", None) == "sum"
    return tensor.device_mesh.get_group(dimension) if is_sum and tensor.placements[dimension].is_replicate() else None


def _add(process_group: dist.ProcessGroup, gradients: list[torch.Tensor | None], indices: Sequence[int]) -> None:
    parts = [part for index in indices if (part := gradients[index]) is not None]
    packed = torch.cat([part.view(-1) for part in parts])
    packed = packed.to(reduction_device(process_group, packed.device))
    dist.all_reduce(packed, group=process_group)
    complete = packed.to(parts[0].device).split([part.numel() for part in parts])
    for index, part, gradient in zip(indices, parts, complete, strict=True):
        gradients[index] = gradient.view(part.shape)


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"gradients must be dense, got {gradient.layout} of shape {tuple(gradient.shape)}: "
            "build the embedding with sparse=False"
        )
    return gradient
