"""What an implementation of the step's sweeps provides, and what it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..formulas.chunk_view import ChunkView, Input
from ..formulas.layer_table import LayerTable
from ..formulas.rounding import Rounding
from ..formulas.rows import Rows
from ..formulas.stages import Stage
from ..sharding.layout import Layout

__all__ = [
    "IMPORTED_IN",
    "SETS_OF_GRADIENTS",
    "ElementUpdate",
    "GroupOperands",
    "ImplementationError",
    "Kernels",
    "LocalSums",
    "Operands",
    "Recent",
    "Sweeps",
]


class ImplementationError(RuntimeError):
    """An implementation that was asked for cannot be had; the message says what is missing."""


IMPORTED_IN = os.getpid()  # in a fork, torch's threads are gone


SETS_OF_GRADIENTS = 8
"""How many sets of layers without gradient have their tables kept; each further one would take memory for ever."""


class Recent:
    """What was made of the contents that were asked for last."""

    def __init__(self, most: int):
        self.most = most
        self.made: list[tuple[Any, Any]] = []  # content and what was made of it, the last one first

    def __contains__(self, content: Any) -> bool:
        return any(known == content for known, _ in self.made)

    def find(self, content: Any, make: Callable[[], Any]) -> Any:
        """What was made of an equal content, else what `make` returns; what was asked for longest ago is dropped."""
        newest = next((pair for pair in self.made if pair[0] == content), None) or (content, make())
        self.made = [newest, *(pair for pair in self.made if pair is not newest)][: self.most]
        return newest[1]


@dataclass
class GroupOperands:
    """One parameter group in a `step()` call, or several that are stepped together (`Algorithm.vector_options`).

    Attributes:
        options: The entry of the optimizer's `param_groups`; of several, with vectors over the layers.
        layers: Indices of its layers into `Layout.layers`.
        tensors: Indices of its local tensors into `Layout.tensors`.
        table: The numbers of its layers. Sums that have been reduced are there.
        rounding: How what it keeps with 16 bits is rounded; None where nothing is, or to nearest.
    """

    options: dict[str, Any]
    layers: range
    tensors: Sequence[int]
    table: LayerTable
    rounding: Rounding | None = None

    @property
    def rows(self) -> Rows:
        """The rows of its layers, where a stage measures them."""
        assert self.table.rows is not None, "the optimizer's has_rows() is False for this group"
        return self.table.rows


@dataclass
class Operands:
    """What one `step()` call works on; tensors are contiguous, by the index of their local tensor in the layout.

    Attributes:
        layout: Of the call; groups that are stepped together are one in it.
        weights: Local parts.
        gradients: None counts as zero.
        state: Element-wise state by name, in the order of `Algorithm.element_state`; then what groups with the master
            "kahan" keep of bf16 weights, `COMPENSATION`, empty tensors elsewhere.
        groups: The parameter groups by their index.
        inputs: What chunks show besides, by name: `mean_square`, of the groups' gradients, where it is wanted, and what
            the algorithm's `inputs` returns.
    """

    layout: Layout
    weights: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor | None]
    state: Mapping[str, Sequence[torch.Tensor]]
    groups: Mapping[int, GroupOperands] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalSums:
    """What this rank's shards of one parameter group add to the sums of a stage.

    Attributes:
        of_layers: fp64, shape (numbers, layers of the group); a row for each name of the stage's `sum_sizes`, or as
            many as that says.
        maxima: fp64, shape (maxima, layers of the group), for each of the stage's `maximum_names`; zero in layers of
            which nothing is here. None if it has none.
        of_rows: fp64, shape (rows on this rank,), for each of the stage's `row_names`.
    """

    of_layers: torch.Tensor
    of_rows: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: torch.Tensor | None = None


class ElementUpdate(Protocol):
    """What happens to an element: an `Update`, or the formula of an algorithm that no such description fits."""

    @property
    def change(self) -> Callable[[ChunkView], torch.Tensor]:
        """Updates the state in a chunk and returns what is subtracted from its weights."""


class Sweeps(Protocol):
    """The sweeps of one `step()` call over those local tensors that an implementation serves.

    Layers that are known not to change by then (`LayerTable.may_change`) need not be measured, and are never written.
    """

    def measure(self, group: int, stage: Stage, *, keep: bool) -> LocalSums | None:
        """Measure a stage of one parameter group.

        Args:
            group: Index of the parameter group.
            stage: What to measure.
            keep: Whether the state that is updated for this may be written, except where a block's gradient is zero.

        Returns:
            None if the implementation does not know this stage.
        """

    def step(self, group: int, stage: Stage) -> LocalSums | None:
        """Measure a group's last stage and apply its update by the stage's rules, layer by layer, in one go.

        All layers must be complete and served, and nothing else may stop the step.

        Args:
            group: Index of the parameter group.
            stage: What to measure.

        Returns:
            As `measure`; None if nothing was done, because the stage has no rules, or this is not worth it or not
            known here.
        """

    def apply(self, group: int, update: ElementUpdate) -> bool:
        """Update state and weights of the group's changing layers; False if the update is not known."""


class Kernels(Protocol):
    """A compiled implementation."""

    name: str

    def devices(self) -> tuple[str, ...]:
        """Types of devices whose memory it works on."""

    def missing(self) -> str | None:
        """What must be installed before it can be used, None if nothing."""

    def unable(self, device: torch.device) -> str | None:
        """Say why it does not work on this device, of a type that it serves, None if it does; finds out by trying."""

    def serves(self, operands: Operands) -> list[bool]:
        """Tell which of the local tensors it can work on."""

    def open(self, operands: Operands, served: Sequence[bool], cache: dict[Any, Any]) -> Sweeps:
        """Begin a step. The cache lives as long as the layout."""
