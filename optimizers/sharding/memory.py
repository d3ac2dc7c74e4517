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
    ranges = [(begin, _size_in_bytes(t), index) for index, t in enumerate(tensors) if (begin := _address(t))]
    cluster: list[int] = []
    end = 0
    for begin, size, index in sorted(ranges):
        if cluster and begin >= end:
            yield cluster
            cluster = []
        cluster.append(index)
        end = max(end, begin + size)
    if cluster:
        yield cluster


def _address(tensor: torch.Tensor) -> int:
    """0 where there is no memory."""
    return 0 if tensor.numel() == 0 or tensor.is_meta else int(tensor.data_ptr())


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
    origin, end = _address(tensors[cluster[0]]), max(_address(tensors[i]) + _size_in_bytes(tensors[i]) for i in cluster)
    offsets = [_address(tensors[index]) - origin for index in cluster]
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
