"""A model's layers by name and by their own shapes, whatever a wrapper has made of the parameters.

    wrapper                        a parameter's `shape`                the layer's own shape is in
    none, DDP, DeepSpeed 0 to 2    the layer's                          itself
    zero.Init, ZeRO-3              (0,)                                 `ds_shape`
    FSDP1 (use_orig_params=True)   a flat run of elements, or nothing   the handle of the flat parameter
    FSDP2, DTensor                 the layer's                          itself

Read from torch 2.13 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from trustratio.optimizers.sharding.names import unwrapped_names

__all__ = ["NamedLayer", "named_layers"]


class NamedLayer(NamedTuple):
    """A layer of a model: its name before the model was wrapped, its parameter, and its own shape."""

    name: str
    parameter: torch.nn.Parameter
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it has two or more dimensions, as layers have that decay and have a trust ratio."""
        return len(self.shape) >= 2


def named_layers(model: torch.nn.Module) -> Iterator[NamedLayer]:
    """Yield the model's parameters as layers, e.g. to make groups of weight decay after the model was wrapped.

    Args:
        model: Wrapped or not. Of what FSDP1 has flattened without `use_orig_params` nothing but the flat parameters is
            left, which are yielded with their flat shape; optimizers refuse them.
    """
    flattened = _flattened_shapes(model)
    for name, parameter in unwrapped_names(model.named_parameters()):
        shape = flattened.get(id(parameter), getattr(parameter, "ds_shape", parameter.shape))
        yield NamedLayer(name, parameter, tuple(shape))


def _flattened_shapes(model: torch.nn.Module) -> dict[int, torch.Size]:
    """Return the shapes, by the parameters' ids, of what FSDP1 has flattened."""
    if "torch.distributed.fsdp" not in sys.modules:
        return {}
    from .fsdp1 import flattened_shapes

    return flattened_shapes(model)
