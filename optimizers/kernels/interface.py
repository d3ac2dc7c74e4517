"""What an implementation of the step's sweeps provides, and what it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..formulas.stages import Sums
from ..formulas.updates import Update
from ..sharding.layout import Layout

__all__ = ["IMPORTED_IN", "SETS_OF_GRADIENTS", "ImplementationError", "Kernels", "Operands", "Recent", "Sweeps"]


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
        found = next((pair for pair in self.made if pair[0] == content), None) or (content, make())
        self.made = [found, *(pair for pair in self.made if pair is not found)][: self.most]
        return found[1]


class Operands:
    """The contiguous tensors of one `step()` call, by the index of their local tensor in the layout.

    Attributes:
        layout: Of the call.
        weights: Local parts.
        gradients: None counts as zero.
        state: Element-wise state by name.
        mean_square: Mean squares of the groups' gradients and their factor, where they are wanted.
    """

    def __init__(
        self,
        layout: Layout,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        state: Mapping[str, Sequence[torch.Tensor]],
    ):
        self.layout = layout
        self.weights = weights
        self.gradients = gradients
        self.state = state
        self.mean_square: tuple[Sequence[torch.Tensor], torch.Tensor] | None = None


class Sweeps(Protocol):
    """The sweeps of one `step()` call over those tensors that an implementation serves."""

    def measure(self, group: int, sums: Sums, changing: torch.Tensor | None, *, keep: bool) -> torch.Tensor | None:
        """Measure sums of one parameter group, shape (names, layers of the group), fp64.

        Args:
            group: Index of the parameter group.
            sums: What to measure.
            changing: Layers that may change, as far as that is known; the others need not be measured.
            keep: Whether updated state may be written, except where a block's gradient is zero.

        Returns:
            None if the implementation does not know these sums.
        """

    def step(self, group: int, sums: Sums, changing: torch.Tensor | None) -> torch.Tensor | None:
        """Measure a group's last sums and apply its update by their rules, layer by layer, in one go.

        All layers must be complete and served, and nothing else may stop the step.

        Args:
            group: As for `measure`.
            sums: What to measure, with rules.
            changing: As for `measure`.

        Returns:
            The sums, as `measure`; None if nothing was done, because this is not worth it or not known here.
        """

    def apply(self, group: int, update: Update, changing: torch.Tensor) -> bool:
        """Update state and weights of the group's changing layers; False if the update is not known."""


class Kernels(Protocol):
    """An implementation."""

    name: str

    def devices(self) -> tuple[str, ...]:
        """Types of devices whose memory it works on."""

    def missing(self) -> str | None:
        """What must be installed before it can be used, None if nothing."""

    def serves(self, operands: Operands) -> list[bool]:
        """Tell which of the local tensors it can work on."""

    def open(self, operands: Operands, served: Sequence[bool], cache: dict[Any, Any]) -> Sweeps:
        """Begin a step. The cache lives as long as the layout."""
