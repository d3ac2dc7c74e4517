"""What the gradient was multiplied by since backward, where no wrapper tells: unscaling, and the user's clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sharding.layout import Layout
from ..sharding.local_tensors import local_part

__all__ = ["factor_between", "probe", "probes_of"]


def probe(gradient: torch.Tensor, begin: int = 0) -> torch.Tensor:
    """A number that is linear in the gradient: the sum of every second element along the last dimension, fp64.

    Of all elements it would be zero for many layers, e.g. a softmax's bias. `begin` is the position in the layer's last
    dimension of the part that is given, so that the parts' numbers add up to the layer's.
    """
    rows = gradient.reshape(-1, gradient.shape[-1] if gradient.dim() else 1)
    return rows[:, begin % 2 :: 2].sum(dtype=torch.float64)


def probes_of(layout: Layout, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The probe of this rank's part of each layer's gradient, shape (layers,).

    Args:
        layout: One whose tensors carry one layer each.
        gradients: The flat gradients of the layout's tensors.
    """
    probes = [torch.zeros((), dtype=torch.float64, device=layout.device) for _ in layout.layers]
    for shard in layout.shards:
        layer = layout.layers[shard.layer]
        gradient = gradients[layer.tensor]
        if gradient is not None:
            local = gradient.view(local_part(layout.tensors[layer.tensor]).shape)
            begin = shard.offset % layer.shape[-1] if layer.shape else 0
            probes[shard.layer] = probe(local, begin).to(layout.device)
    return torch.stack(probes)


def factor_between(layout: Layout, seen: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """What the gradient was multiplied by: a 0-d tensor, fp64, without waiting for the device.

    A probe is linear in the gradient, so the average over ranks of what the hooks saw, times the factor, is what it is
    now. The best factor over all layers is taken; within rounding it is 1.

    Args:
        layout: Of the `step()` call.
        seen: Average over the ranks of the probes that were seen in backward, shape (layers,).
        now: The probes of the gradients now, shape (layers,).
    """
    factor = (now * seen).sum() / seen.square().sum()
    coarsest = max(layer.gradient_resolution for layer in layout.layers)
    is_one = ((factor - 1).abs() <= 16 * coarsest) | (seen == 0).all()
    return torch.where(is_one, torch.ones_like(factor), factor)
