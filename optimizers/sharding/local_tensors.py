"""What of a tensor lies on this rank, how it is cut, and where and in which dtype its numbers are added up.

Without importing DTensor, which a program may never do: its tensors are known by their attributes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "add_over",
    "compute_dtype",
    "cut_alike",
    "cut_of",
    "has_fp64",
    "held_alike",
    "is_flattened",
    "is_plain",
    "local_part",
    "may_be_trained",
    "numbers_device",
    "placements_of",
    "reduction_device",
    "summable",
]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of the tensor lies on this rank: of a DTensor its local tensor, else the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def placements_of(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """How a DTensor is cut, None for any other tensor."""
    return getattr(tensor, "placements", None)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether all of the tensor is here: it is of no subclass."""
    return type(tensor) in _PLAIN


def may_be_trained(tensor: torch.Tensor) -> bool:
    """Whether a frozen tensor could be a layer of real numbers: not the packed weights of a quantised model."""
    return tensor.is_floating_point() and not tensor.is_meta and (is_plain(tensor) or placements_of(tensor) is not None)


def is_flattened(tensor: torch.Tensor) -> bool:
    """Whether FSDP1 has put the tensor's elements into a flat parameter: its mark, since torch 2.0."""
    return getattr(tensor, "_fsdp_flattened", False)


def cut_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What changes if a tensor is cut anew, moved or converted without becoming another object.

    For comparison in this process only.
    """
    here = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    placements = None if is_plain(tensor) else placements_of(tensor)
    return here if placements is None else (*here, placements, id(tensor.device_mesh))  # type: ignore[attr-defined]


def cut_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one layer have the same elements on this rank."""
    if is_plain(one) and is_plain(other):  # nearly all; the general way takes its time
        return one.shape == other.shape
    return placements_of(one) == placements_of(other) and local_part(one).shape == local_part(other).shape


def held_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors that are cut alike are the same part: a DTensor that was pickled is still its rank's."""
    if is_plain(one) or is_plain(other):
        return True
    return _part_of(one) == _part_of(other) and local_part(one).shape == local_part(other).shape


def _part_of(tensor: torch.Tensor) -> list[int | None]:
    """The rank's place along those dimensions of the mesh over which a DTensor is cut."""
    placements = placements_of(tensor)
    if placements is None:
        return []
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    place = mesh.get_coordinate() or [None] * len(placements)
    return [at for at, placement in zip(place, placements, strict=True) if not placement.is_replicate()]


def reduction_device(process_group: dist.ProcessGroup, preferred: torch.device) -> torch.device:
    """Where the group's collectives work: `preferred`, or its own device when NCCL meets offloaded CPU state."""
    supported = process_group._device_types
    if any(device.type == preferred.type for device in supported):
        return preferred
    if supported[0].type == "cpu":
        return torch.device("cpu")
    return torch.device(supported[0].type, torch.accelerator.current_device_index())


def compute_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The dtype of state and arithmetic: fp32, or fp64 for fp64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


@functools.cache
def has_fp64(device: torch.device) -> bool:
    """Whether there are tensors in fp64 on the device; tried once."""
    if device.type == "mps":
        return False
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def numbers_device(device: torch.device) -> torch.device:
    """Where the fp64 numbers of layers whose elements are on `device` are kept: there, or on a CPU."""
    return device if has_fp64(device) else torch.device("cpu")


def summable(elements: torch.Tensor) -> torch.Tensor:
    """The elements where they can be added up in fp64: as they are, or a copy on the CPU."""
    return elements.to(numbers_device(elements.device))


def add_over(process_group: dist.ProcessGroup, values: torch.Tensor) -> None:
    """Add `values` over the ranks of one group, in place."""
    if dist.get_world_size(process_group) == 1:
        return
    packed = values.to(reduction_device(process_group, values.device))
    dist.all_reduce(packed, group=process_group)
    values.copy_(packed)
