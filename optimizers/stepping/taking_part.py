"""Which tensors take part in a `step()` call: all but frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..sharding.local_tensors import placements_of

__all__ = ["frozen_layers", "taking_part"]

WasGiven = Callable[[torch.Tensor], bool]


def taking_part(groups: Sequence[dict[str, Any]], was_given: WasGiven) -> tuple[list[int], list[torch.Tensor]]:
    """The tensors of a `step()` call, and the index of each one's group.

    Frozen parameters without a gradient are left out, whatever they are: nothing of them is looked at, and no rank has
    a part in them. What a wrapper steps in the parameters' place need not be marked as trained.

    Args:
        groups: The call's.
        was_given: Whether a tensor is a parameter that the optimizer was given.
    """
    indices, tensors = [], []
    for index, group in enumerate(groups):
        for tensor in group["params"]:
            if tensor.requires_grad or tensor.grad is not None or not _is_parameter(tensor, was_given):
                indices.append(index)
                tensors.append(tensor)
    return indices, tensors


def frozen_layers(groups: Sequence[dict[str, Any]], was_given: WasGiven) -> list[tuple[str, torch.Tensor]]:
    """The parameters that are left out and could be trained, each with its place, "group.index"."""
    _, tensors = taking_part(groups, was_given)
    present = set(map(id, tensors))
    return [
        (f"{index}.{position}", tensor)
        for index, group in enumerate(groups)
        for position, tensor in enumerate(group["params"])
        if id(tensor) not in present and tensor.is_floating_point() and _has_elements(tensor)
    ]


def _has_elements(tensor: torch.Tensor) -> bool:
    """Whether the layer has any, on whatever rank: of one that FSDP1 has cut, this rank may hold none."""
    return bool(tensor.numel()) or bool(getattr(tensor, "_fsdp_flattened", False))


def _is_parameter(tensor: torch.Tensor, was_given: WasGiven) -> bool:
    return was_given(tensor) or placements_of(tensor) is not None
