"""DeepSpeed: which rank holds which elements of a layer under ZeRO, and where in its flat tensor."""

from __future__ import annotations

from typing import Any

import torch

from trustratio.optimizers.sharding.gradient_flow import Slice

from .internals import slice_in_partition

__all__ = ["slice_of_rank", "slices_of_layer", "slices_of_view"]


def slices_of_view(parameter: torch.Tensor, partition: torch.Tensor) -> list[Slice]:
    """ZeRO-1/2: a group's parameters lie in one buffer that is cut into equal partitions, one per rank.

    Every parameter is a view of that buffer, so its storage offset is its position, whatever the order
    (`round_robin_gradients`) and gaps (`parameter_alignment`).

    Args:
        parameter: One of the group's.
        partition: Any rank's partition of the group's buffer; its size counts.
    """
    position = int(parameter.storage_offset())
    end, size = position + parameter.numel(), partition.numel()
    slices: list[Slice] = []
    for owner in range(position // size, -(-end // size)) if end > position else ():
        begin, stop = max(position, owner * size), min(end, (owner + 1) * size)
        slices.append(Slice(owner, begin - position, stop - begin, begin - owner * size))
    return slices


def slices_of_layer(wrapper: Any, parameter: Any, ranks: int) -> list[Slice]:
    """ZeRO-3: every rank holds one slice of each parameter, at the same place in its partition of the sub-group.

    The last slices end in uninitialised padding.

    Args:
        wrapper: DeepSpeed's optimizer of stage 3.
        parameter: One of the sub-group's.
        ranks: Among how many it is partitioned.
    """
    start, length = slice_in_partition(wrapper, parameter)
    return [
        Slice(owner, owner * length, min(length, parameter.ds_numel - owner * length), start)
        for owner in range(ranks)
        if owner * length < parameter.ds_numel
    ]


def slice_of_rank(slices: list[Slice], rank: int) -> Slice:
    """What one rank has, which may be of length 0."""
    return next((part for part in slices if part.owner == rank), Slice(rank, 0, 0, 0))
