"""Gradients that a step has although no group's was seen in backward: refused on all ranks, or on none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sharding.layout import Layout
from .norms import HOW_TO_BUILD, StatisticsError
from .watched import Watched

__all__ = ["refuse_without_any_group", "refuse_without_forward", "refuse_without_groups", "unseen_layers"]

Gradients = Sequence[torch.Tensor | None]


def refuse_without_any_group(owner: str, layout: Layout, gradients: Gradients) -> None:
    """Raise StatisticsError if any layer has a gradient. Zeros may come: some wrappers step once to make the state."""
    if _not_zero(layout, gradients, range(len(layout.layers))):
        raise StatisticsError(f"{owner} has gradients but saw no group's gradient. {HOW_TO_BUILD}")


def refuse_without_forward(owner: str, layout: Layout, watched: Sequence[Watched], gradients: Gradients) -> None:
    """Raise StatisticsError if a layer has a gradient whose place no other tensor was seen to take in a forward."""
    unseen = [
        index
        for index, (layer, seen) in enumerate(zip(layout.layers, watched, strict=True))
        if seen.source is None and gradients[layer.tensor] is not None
    ]
    for index in _not_zero(layout, gradients, unseen):
        raise StatisticsError(
            f"{owner} has a gradient of layer {layout.layers[index].name} but saw none of its groups', since no "
            "forward of a module under fully_shard was seen to use it. Construct the optimizer, or add the group, "
            "before the forward, and call the module rather than a method of it. A layer that is thawed later has to "
            "be used in the first forward too"
        )


def refuse_without_groups(owner: str, layout: Layout, watched: Sequence[Watched], gradients: Gradients) -> None:
    """Raise StatisticsError if a layer has a gradient and no groups; for one process with whole layers."""
    for layer, seen in zip(layout.layers, watched, strict=True):
        gradient = gradients[layer.tensor]
        if seen.groups == 0 and gradient is not None and gradient.any():
            raise StatisticsError(f"{owner} has a gradient of layer {layer.name} but saw no group's. {HOW_TO_BUILD}")


def _not_zero(layout: Layout, gradients: Gradients, indices: Sequence[int]) -> list[int]:
    """Of these layers those whose gradient is not zero on any rank. Waits for the device, if there are any.

    Of a layer that is cut, some ranks may have zeros alone, and would go on to wait for one that raises. So they ask
    each other. Which layers are asked for must be the same on all ranks: whether backward and forward were seen is, as
    wrappers that cut layers have all ranks gather and reduce them together.
    """
    if not indices:
        return []
    totals = layout.reduce(_not_zero_here(layout, gradients, indices).unsqueeze(0))[0].tolist()
    return [index for index in indices if totals[index]]


def unseen_layers(layout: Layout, gradients: Gradients) -> torch.Tensor:
    """1 for each layer that has a gradient here, shape (layers,), fp64; for a rank that has seen no group at all."""
    return _not_zero_here(layout, gradients, range(len(layout.layers)))


def _not_zero_here(layout: Layout, gradients: Gradients, indices: Sequence[int]) -> torch.Tensor:
    """1 for each of these layers that lies in a gradient which is not zero, shape (layers,), fp64.

    Each tensor is looked at once, as all layers of a group may lie in one.
    """
    given = {layout.layers[index].tensor: gradients[layout.layers[index].tensor] for index in indices}
    of_tensors = {tensor: gradient.any() for tensor, gradient in given.items() if gradient is not None}
    found = torch.zeros(len(layout.layers), dtype=torch.float64, device=layout.numbers_device)
    for index in indices:
        not_zero = of_tensors.get(layout.layers[index].tensor)
        if not_zero is not None:
            found[index] = not_zero.to(found.device)
    return found
