"""What is known of one parameter's group gradients."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

__all__ = ["Watched"]


@dataclass
class Watched:
    """What is known of one parameter's group gradients since the last step.

    Attributes:
        parameter: The parameter, which a wrapper may drop.
        source: The tensor that takes the parameter's place in forward, where a wrapper puts one there.
        groups: How many groups of this rank were seen.
        sums: Three numbers, fp64: the groups' norms, their squares, and their probes (see `factor.probe`), added up.
        squares: Flat, of the parameter's size: the squares of the groups' elements, added up. None where they are not
            wanted, or do not stay on this rank.
    """

    parameter: weakref.ref[torch.Tensor]
    source: weakref.ref[torch.Tensor] | None = None
    groups: int = 0
    sums: torch.Tensor | None = None
    squares: torch.Tensor | None = None

    def clear(self) -> None:
        """Forget the groups."""
        self.groups = 0
        if self.sums is not None:
            self.sums.zero_()
        if self.squares is not None:
            self.squares.zero_()
