"""The numbers of each layer during a step: sums that came back from the reduction, and what an algorithm makes of them.

Everything here is a vector with one fp64 entry per layer of one parameter group, on the device of the parameters, so
that no step waits for the host (on a CPU where that device has no fp64).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..sharding.layout import Layer

if TYPE_CHECKING:
    from .rows import Rows

__all__ = ["LayerTable", "safe_ratio"]


class LayerTable:
    """Vectors over the layers of one parameter group, shape (layers,), fp64.

    Any attribute that an algorithm assigns is a new vector, so that its lines read like the paper's:
    `layers.clip = ...` in `stages`, then `layers.clip` in `update`. Hence a misspelt name is a vector too. Reading one
    that nobody has assigned raises AttributeError with the nearest names; one that nobody reads is found by a test
    alone (of the package's optimizers, tests/unit/test_layer_table.py). Names of methods cannot be assigned.

    Five are set by the step: the per-layer state of the algorithm (its new value is kept for layers that have a
    gradient), `adapt`, the numbers of `elements`, the `resolution` of the gradients' dtypes, and the sums that a stage
    measured, which `total` and `norm` return by their names. `trust_ratio` is what `trust_ratios()` reports: 1 unless
    an algorithm assigns it. `moves` says which layers this step is meant to move, None for all. In groups whose rows
    are measured, `rows` tells which of them this rank holds, and `row_norm` has one entry for each.
    """

    elements: torch.Tensor
    resolution: torch.Tensor
    moves: torch.Tensor | None = None

    def __setattr__(self, name: str, vector: Any) -> None:
        if callable(type(self).__dict__.get(name)):
            raise AttributeError(f"{name!r} is a method of LayerTable: give the vector another name")
        self.__dict__[name] = vector

    def __init__(
        self,
        layers: list[Layer],
        adapt: torch.Tensor,
        state: dict[str, torch.Tensor],
        gradient_norm: Callable[[], torch.Tensor] | None = None,
    ):
        self.layers = layers
        self.adapt = adapt
        self.trust_ratio = torch.ones(len(layers), dtype=torch.float64, device=adapt.device)
        self._gradient_norm = gradient_norm
        self._totals: dict[str, torch.Tensor] = {}
        self._model_totals: dict[str, torch.Tensor] = {}
        self._row_totals: dict[str, torch.Tensor] = {}
        self.rows: Rows | None = None
        self.__dict__.update(state)

    def __getattr__(self, name: str) -> torch.Tensor:
        vectors = [known for known in self.__dict__ if not known.startswith("_")]
        nearest = difflib.get_close_matches(name, vectors) or vectors
        raise AttributeError(
            f"no per-layer numbers named {name!r}: assign them before use; there are {', '.join(nearest)}"
        )

    def receive(self, name: str, totals: torch.Tensor, model_total: torch.Tensor) -> None:
        """Take a number that a stage has measured: per layer of this group, and over all layers that have it."""
        self._totals[name] = totals
        self._model_totals[name] = model_total

    def receive_rows(self, name: str, totals: torch.Tensor) -> None:
        """Take a sum of a stage over each row that this rank holds, complete also where the row is cut."""
        self._row_totals[name] = totals

    def row_norm(self, name: str) -> torch.Tensor:
        """L2 norm of each row, shape (rows,), if the stage summed squares."""
        return self._row_totals[name].sqrt()

    def total(self, name: str) -> torch.Tensor:
        """Each layer's sum (or maximum) over all its shards, as named by the stage; (bins, layers) for a histogram."""
        return self._totals[name]

    def norm(self, name: str) -> torch.Tensor:
        """Square root of `total`: each layer's L2 norm of summed squares, maximum norm of the largest ones."""
        return self._totals[name].sqrt()

    def model_norm(self, name: str) -> torch.Tensor:
        """L2 norm over all layers of all groups in this step, shape ()."""
        return self._model_totals[name].sqrt()

    def model_gradient_norm(self) -> torch.Tensor:
        """L2 norm of the whole model's gradient, shape (); needs the sum "g" of every group.

        Asks the wrapper where a step does not see the whole model.
        """
        if self._gradient_norm is None:
            return self.model_norm("g")
        return self._gradient_norm().to(self.adapt.device).to(torch.float64)

    def may_change(self) -> torch.Tensor | None:
        """The same as `has_gradient` as soon as that is known, None before."""
        return self.has_gradient() if "g" in self._totals else None

    def has_gradient(self) -> torch.Tensor:
        """Which layers are updated: those whose gradient is not zero everywhere.

        Where group gradients are watched, at least one of them too must not be zero; and none at all is updated if any
        of them was not finite, on any rank in any layer.
        """
        has_gradient = self._totals["g"] != 0
        if "not_finite" in self._totals:
            has_gradient &= (self._totals["not_finite"] == 0) & (self._totals["group_square"] != 0)
        return has_gradient


def adapts(layer: Layer, adapt: bool | None) -> bool:
    """Whether the trust ratio scales this layer: as told, or (None) if it has two or more dimensions."""
    return len(layer.shape) >= 2 if adapt is None else adapt


def safe_ratio(numerator: torch.Tensor, denominator: torch.Tensor, adapt: torch.Tensor) -> torch.Tensor:
    """Numerator / denominator per layer; 1 where either is zero and for layers that are not adapted.

    NaN stays NaN, so that a broken layer is seen on every rank alike.
    """
    usable = adapt & (numerator != 0) & (denominator != 0)
    return torch.where(usable, numerator / denominator, torch.ones_like(numerator))
