"""From the tensors of a `step()` call to their proven layout: the one entry for a step and for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backends import explain
from .layout import Layout, LayoutError
from .observed import ObservedOptimizer
from .segments import in_segments
from .unsharded import whole_parameters

__all__ = ["resolve_layout"]


def resolve_layout(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout:
    """Find and prove the layout of the local tensors of one `step()` call.

    Args:
        optimizer: The layer-wise optimizer; it knows which parameters its constructor was given.
        tensors: (index into `optimizer.param_groups`, local tensor) pairs.

    Raises:
        LayoutError: If no backend explains the tensors, they are on several devices or share memory, or the shards do
            not add up.
    """
    layout = explain(optimizer, tensors) or whole_parameters(optimizer, tensors)
    _refuse_several_devices(layout)
    if not isinstance(optimizer, ObservedOptimizer):  # of which parameters are the layers
        layout = in_segments(layout, optimizer.param_groups)
    layout.prove()
    return layout


def _refuse_several_devices(layout: Layout) -> None:
    """Raise LayoutError if the local tensors are not all on one device, where a step keeps the layers' numbers."""
    on_device = [(layout.tensors[layer.tensor], layer) for layer in reversed(layout.layers)]
    # Of frozen parameters, which only a checkpoint describes, it does not matter where they are.
    layer_on = {
        tensor.device: layer.name
        for tensor, layer in on_device
        if tensor.requires_grad or tensor.grad is not None or tensor is not layer.parameter
    }
    if len(layer_on) > 1:
        described = " and ".join(f"{name} on {device}" for device, name in layer_on.items())
        raise LayoutError(
            f"the parameters of one optimizer must be on one device, got {described}: move the model to one device "
            "before the first step, or build one optimizer per device"
        )
