"""Where the layers are in the tensors that any optimizer is stepped with, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trustratio.optimizers.sharding.backends import stepped_tensors
from trustratio.optimizers.sharding.layout import Layout, LayoutError
from trustratio.optimizers.sharding.local_tensors import local_part
from trustratio.optimizers.sharding.observed import ObservedOptimizer
from trustratio.optimizers.sharding.resolve import resolve_layout
from trustratio.optimizers.stepping.state import stepped_weights

__all__ = ["Shards", "find_shards", "layers_of"]

FSDP1_PREFIX = "_fsdp_wrapped_module."


@dataclass(frozen=True)
class Shards:
    """The tensors of a whole step, and the layers' parts in them."""

    layout: Layout

    @torch.no_grad()
    def fill_padding(self, value: float) -> int:
        """Write `value` wherever no layer is; returns to how many elements of this rank."""
        filled = 0
        for index, tensor in enumerate(self.layout.tensors):
            here = local_part(tensor.detach())
            outside = torch.ones(here.numel(), dtype=torch.bool, device=here.device)
            for shard in self.layout.shards:
                if self.layout.layers[shard.layer].tensor == index:
                    outside[shard.start : shard.start + shard.length] = False
            if here.is_contiguous():
                here.view(-1)[outside] = value
                filled += int(outside.sum())
        return filled

    def values(self, optimizer: torch.optim.Optimizer) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """Return what is stepped of the layers here, as (first element, values), of layers whose parts are runs."""
        layers = self.layout.layers
        cut_up = {layers[shard.layer].name for shard in self.layout.shards if not shard.is_run}
        parts: dict[str, list[tuple[int, torch.Tensor]]] = {
            layer.name: [] for layer in layers if layer.name not in cut_up
        }
        for shard in self.layout.shards:
            layer = layers[shard.layer]
            flat = stepped_weights(optimizer, self.layout.tensors[layer.tensor]).reshape(-1)
            if layer.name in parts:
                parts[layer.name].append((shard.offset, flat[shard.start : shard.start + shard.length].cpu().clone()))
        return parts


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by the names that they had before it was wrapped."""
    return {name.replace(FSDP1_PREFIX, ""): parameter for name, parameter in model.named_parameters()}


def find_shards(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Shards | None:
    """Ask the backends what the optimizer is stepped with; None if none of them explains it. On all ranks alike."""
    observed = ObservedOptimizer(optimizer, layers_of(model).items())
    try:
        return Shards(resolve_layout(observed, stepped_tensors(observed)))
    except LayoutError:
        return None
