"""An optimizer's weights and state by layer name, as far as this rank holds them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from trustratio.optimizers import TrustRatio
from trustratio.optimizers.formulas.chunk_view import COMPENSATION
from trustratio.optimizers.layerwise import LayerwiseOptimizer
from trustratio.optimizers.sharding.backends import publish_weights, stepped_tensors
from trustratio.optimizers.sharding.local_tensors import local_part
from trustratio.optimizers.sharding.resolve import resolve_layout
from trustratio.optimizers.stepping.foreign_state import without_wrappers
from trustratio.optimizers.stepping.state import (
    element_dtype,
    keeps_compensation,
    layer_numbers,
    make_element_state,
    number_dtype,
    set_layer_numbers,
)

from .pieces import Piece, ReadBlock, pieces_by_layer

__all__ = ["WEIGHT", "LocalLayer", "LocalState", "unwrapped"]

WEIGHT = "weight"


@dataclass
class LocalLayer:
    """One layer, as this rank sees it.

    Attributes:
        name: Unique over all ranks.
        shape: The whole layer's.
        group: Index of its parameter group.
        tensor: The local tensor that carries it.
        position: Among the layers of that tensor.
        pieces: What this rank holds of it.
        frozen: Whether it takes no part in training, so that a file may do without it.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    tensor: torch.Tensor
    position: int
    pieces: list[Piece]
    frozen: bool


class LocalState:
    """The optimizer's weights and state on this rank.

    Args:
        optimizer: An optimizer of this package, or what wraps it.
        model: Names the layers, if given.
    """

    def __init__(self, optimizer: Any, model: torch.nn.Module | None):
        self.optimizer = unwrapped(optimizer)
        self.element_state = list(self.optimizer.element_state)
        self.layer_state = list(self.optimizer.layer_state)
        self.layout = resolve_layout(self.optimizer, stepped_tensors(self.optimizer))
        names = {id(p): without_wrappers(name) for name, p in model.named_parameters()} if model is not None else {}
        parts = Counter(id(layer.parameter) for layer in self.layout.layers if layer.parameter is not None)
        seen: Counter[int] = Counter()  # id of a parameter -> layers so far; several if its segments are layers
        self.carried: Counter[int] = Counter()  # id of a local tensor -> number of its layers
        self.layers: list[LocalLayer] = []
        for layer, pieces in zip(self.layout.layers, pieces_by_layer(self.layout), strict=True):
            tensor = self.layout.tensors[layer.tensor]
            name = names.get(id(layer.parameter), layer.name)
            if id(layer.parameter) in names and parts[id(layer.parameter)] > 1:
                name = f"{name}[{seen[id(layer.parameter)]}]"
            seen[id(layer.parameter)] += 1
            self.layers.append(
                LocalLayer(
                    name=name,
                    shape=layer.shape,
                    group=self.layout.groups[layer.tensor],
                    tensor=tensor,
                    position=self.carried[id(tensor)],
                    pieces=pieces,
                    frozen=tensor is layer.parameter and not (tensor.requires_grad or self.optimizer.state.get(tensor)),
                )
            )
            self.carried[id(tensor)] += 1
        self.by_name = {layer.name: layer for layer in self.layers}

    @property
    def class_name(self) -> str:
        """The optimizer's class."""
        return type(self.optimizer).__name__

    @property
    def state_of_others(self) -> list[str]:
        """What a wrapper has put beside the optimizer's own state."""
        known = {*self.element_state, *self.layer_state, COMPENSATION, "layers"}
        found = (self.optimizer.state.get(tensor, {}).keys() - known for tensor in self.layout.tensors)
        return sorted(set().union(*found))

    def names_of_group(self, index: int) -> list[str]:
        """The layers of one parameter group."""
        return [layer.name for layer in self.layers if layer.group == index]

    def has_compensation(self, layer: LocalLayer) -> bool:
        """Whether a layer's weight is the sum of two bf16 numbers, of which the second is state."""
        return keeps_compensation(layer.tensor, self.optimizer.param_groups[layer.group])

    def kept_of(self, layer: LocalLayer) -> tuple[str, ...]:
        """What is kept of a layer: its weight, and its state by name."""
        compensation = [COMPENSATION] if self.has_compensation(layer) else []
        return (WEIGHT, *self.element_state, *compensation, *self.layer_state)

    def dtype(self, layer: LocalLayer, what: str) -> torch.dtype:
        """In which a layer's weight or state is kept."""
        if what == WEIGHT:
            return layer.tensor.dtype
        if what in self.layer_state:
            return number_dtype(layer.tensor, what)
        return element_dtype(layer.tensor, what, self.optimizer.param_groups[layer.group])

    def layer_numbers(self, layer: LocalLayer, what: str) -> torch.Tensor:
        """The per-layer state of all layers in the layer's tensor, fp64."""
        return layer_numbers(self.optimizer, layer.tensor, what, self.carried[id(layer.tensor)])

    def copy_to(self, rows: torch.Tensor, first: int, layer: LocalLayer, what: str) -> None:
        """Copy this rank's elements of a layer's rows from `first` on; what does not exist yet is zero."""
        if what in self.layer_state:
            rows.copy_(self.layer_numbers(layer, what)[layer.position])
            return
        whole = layer.tensor if what == WEIGHT else self.optimizer.state.get(layer.tensor, {}).get(what)
        if whole is not None:
            flat = local_part(whole).detach().reshape(-1)
            for piece in layer.pieces:
                piece.copy_to(rows, first, flat)

    def set_numbers(self, layer: LocalLayer, what: str, value: float) -> None:
        """Set one layer's per-layer state."""
        numbers = self.layer_numbers(layer, what).clone()
        numbers[layer.position] = value
        set_layer_numbers(self.optimizer, layer.tensor, what, numbers)

    def copy_from(self, read: ReadBlock, layer: LocalLayer, what: str) -> None:
        """Set this rank's elements of a layer."""
        part = self._part(layer, what)
        flat = part.reshape(-1)
        for piece in layer.pieces:
            piece.copy_from(read, flat)
        if not part.is_contiguous():
            part.copy_(flat.view(part.shape))

    def copy_compensation_from(self, read: ReadBlock, read_weight: ReadBlock, layer: LocalLayer) -> bool:
        """Set what this rank's elements of a layer lack of their sums, where the weights are those that it is of.

        Returns False if none of them are.
        """
        weights, part = self._part(layer, WEIGHT), self._part(layer, COMPENSATION)
        theirs, rest = (
            torch.full_like(one, torch.nan, memory_format=torch.contiguous_format) for one in (weights, part)
        )
        for piece in layer.pieces:
            piece.copy_from(read_weight, theirs.view(-1))
            piece.copy_from(read, rest.view(-1))
        same = theirs == weights
        part.copy_(torch.where(same, rest, part))
        return bool(same.any()) or bool(theirs.isnan().all())

    def _part(self, layer: LocalLayer, what: str) -> torch.Tensor:
        """The local part of the tensor that carries a layer, or of its state, which is made if there is none."""
        if what == WEIGHT:
            return local_part(layer.tensor).detach()
        state, group = self.optimizer.state[layer.tensor], self.optimizer.param_groups[layer.group]
        return local_part(make_element_state(state, layer.tensor, what, group)).detach()

    def publish_weights(self) -> None:
        """Bring the model's parameters up to date where the optimizer's weights are not the model's own."""
        publish_weights(self.optimizer)


def unwrapped(optimizer: Any) -> LayerwiseOptimizer:
    """The optimizer of this package inside what wraps it.

    Raises:
        TypeError: If there is none, or it keeps somebody else's state.
    """
    inner = optimizer
    while inner is not None and not isinstance(inner, LayerwiseOptimizer):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise TypeError(
            f"expected an optimizer of trustratio.optimizers or what wraps one, got {type(optimizer).__name__}"
        )
    if isinstance(inner, TrustRatio):
        raise TypeError(
            f"the state of TrustRatio is {inner.base_class.__name__}'s, of which nobody here knows what it means: "
            "save and load it as the wrapper does any optimizer's (engine.save_checkpoint, "
            "torch.distributed.checkpoint.state_dict, FullyShardedDataParallel.optim_state_dict), or by state_dict()"
        )
    return inner
