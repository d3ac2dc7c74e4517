"""Along the gradient of the last step, of which each rank has what it steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..sharding.layout import Layout
from ..sharding.local_tensors import local_part
from ..sharding.moved_weights import Change
from ..stepping.gradients import read_gradients
from .displacement import Displacement, Scaler

__all__ = ["PreviousGradient", "finite"]


class PreviousGradient(Displacement):
    """w - step_size · g, g as the last `step()` got it: averaged over ranks and micro-batches, unscaled and clipped.

    A layer that had no gradient stays where it is, and so does an element whose gradient was not finite. It keeps one
    gradient, sharded and in the dtype in which it is stepped.
    """

    def __init__(self) -> None:
        self._gradients = WeakIdKeyDictionary()  # local tensor -> its gradient's local part

    def see(self, layout: Layout, call: Collection[int], scaler: Scaler) -> None:
        gradients = read_gradients(layout)
        for index in call:
            tensor, gradient = layout.tensors[index], gradients[index]
            if gradient is None:
                self._gradients.pop(tensor, None)
            else:
                self._keep(tensor, gradient.detach(), scaler)

    def _keep(self, tensor: torch.Tensor, gradient: torch.Tensor, scaler: Scaler) -> None:
        kept = self._gradients.get(tensor)
        if kept is None or kept.shape != gradient.shape or kept.dtype != gradient.dtype:
            kept = self._gradients[tensor] = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
        unscaled = gradient if scaler.scale is None else gradient / scaler.scale.to(gradient.device)
        kept.copy_(scaler.kept(finite(unscaled), kept))

    def moves(self, layout: Layout, number: int, step_size: float) -> tuple[Sequence[torch.Tensor], Change]:
        kept = list(self._kept(layout).values())

        def change(index: int, weights: torch.Tensor) -> None:
            weights.sub_(kept[index][1].view(weights.shape), alpha=step_size)

        return [tensor for tensor, _ in kept], change

    def _kept(self, layout: Layout) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The tensors that have a gradient, and it, by their indices."""
        tensors = [(index, tensor) for index, tensor in enumerate(layout.tensors) if tensor in self._gradients]
        return {index: (tensor, self._gradients[tensor]) for index, tensor in tensors}

    def state_dict(self, layout: Layout | None) -> dict[str, Any]:
        if layout is None:
            return {"gradients": {}, "layers": {}}
        kept, names = self._kept(layout), _layers_of_tensors(layout)
        return {
            "gradients": {index: gradient for index, (_, gradient) in kept.items()},
            "layers": {index: names[index] for index in kept},
        }

    def load_state_dict(self, state: dict[str, Any], layout: Layout) -> None:
        here = _layers_of_tensors(layout)
        for index, gradient in state["gradients"].items():
            tensor = layout.tensors[index] if index < len(here) else None
            fits = tensor is not None and local_part(tensor).shape == gradient.shape
            if tensor is None or not fits or here[index] != state["layers"][index]:
                raise ValueError(
                    f"the extrapolation's state has a gradient of shape {tuple(gradient.shape)} for "
                    f"{', '.join(state['layers'][index])}, where this run steps other layers or has cut them in "
                    "another way: resume with the same model, wrapper and number of ranks, each rank with its own state"
                )
        self._gradients.clear()
        for index, gradient in state["gradients"].items():
            tensor = layout.tensors[index]
            self._gradients[tensor] = gradient.detach().to(tensor.device, copy=True)

    def remove(self) -> None:
        self._gradients.clear()


def finite(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient with zeros where it is NaN or infinite: whoever skips such a step would have NaN from then on."""
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _layers_of_tensors(layout: Layout) -> list[list[str]]:
    """The names of the layers that each local tensor carries."""
    names: list[list[str]] = [[] for _ in layout.tensors]
    for layer in layout.layers:
        names[layer.tensor].append(layer.name)
    return names
