"""Whether tensors have memory in common. What is in two of them would be stepped twice, and the second step's norms
would be of other weights than the first one's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

__all__ = ["is_dense", "shared_memory"]


def shared_memory(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Find tensors that have elements in common: pairs of indices, (i, i) for one whose own elements overlap.

    Views of one buffer that do not overlap have none. Takes time and memory only where addresses are in question.
    """
    pairs: list[tuple[int, int]] = []
    for cluster in _clusters(tensors):
        if len(cluster) > 1 or not is_dense(tensors[cluster[0]]):
            pairs += _overlaps(tensors, cluster)
    return sorted(pairs)


def _clusters(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Tensors whose ranges of addresses overlap, transitively."""
    ranges = [(*_place(t), _size_in_bytes(t), i) for i, t in enumerate(tensors) if _has_memory(t)]
    cluster: list[int] = []
    reached = (0, 0)
    for memory, begin, size, index in sorted(ranges):
        if cluster and (memory, begin) >= reached:
            yield cluster
            cluster, reached = [], (memory, 0)
        cluster.append(index)
        reached = max(reached, (memory, begin + size))
    if cluster:
        yield cluster


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and not tensor.is_meta and tensor.data_ptr() != 0


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """In which memory the tensor begins, and at which byte of it."""
    if tensor.device.type != "mps":
        return 0, tensor.data_ptr()
    # Metal's buffers have handles, which lie closer to each other than the buffers are long.
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr() - offset, offset


def _size_in_bytes(tensor: torch.Tensor) -> int:
    """From the first to the last byte."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether it is certain that the tensor has each byte of its range once."""
    has_no_overlap = torch._debug_has_internal_overlap(tensor) == 0
    return has_no_overlap and tensor.numel() * tensor.element_size() == _size_in_bytes(tensor)


def _overlaps(tensors: Sequence[torch.Tensor], cluster: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs in a cluster: paints the elements of one tensor after the other, as large as addresses allow."""
    begins = [_place(tensors[index])[1] for index in cluster]
    ends = [begin + _size_in_bytes(tensors[index]) for begin, index in zip(begins, cluster, strict=True)]
    origin, end = min(begins), max(ends)
    offsets = [begin - origin for begin in begins]
    grain = math.gcd(*offsets, *(tensors[index].element_size() for index in cluster))
    owners = torch.full(((end - origin) // grain,), -1, dtype=torch.int32, device="cpu")
    for index, offset in zip(cluster, offsets, strict=True):
        tensor, grains = tensors[index], tensors[index].element_size() // grain
        strides = [stride * grains for stride in tensor.stride()]
        own = owners.as_strided((*tensor.shape, grains), (*strides, 1), offset // grain)
        other = int(own.max())
        if other >= 0:
            yield other, index
        own.fill_(index)
        if int((owners == index).sum()) < own.numel():
            yield index, index
