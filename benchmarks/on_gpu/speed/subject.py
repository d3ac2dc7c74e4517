"""What is stepped: parameters in two groups, as users have them, and where their gradients come from."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.shapes import Shape, make_parameters

from .contenders import IN_MICRO_BATCHES

__all__ = ["Subject"]

MICRO_BATCHES = (0.5, 1.5)
"""Gradients of the micro-batches that make an update, as parts of their mean."""


class Subject:
    """Parameters that all contenders step in turn, each finding the gradients as they were at first.

    Attributes:
        parameters: All of them.
    """

    def __init__(self, shapes: list[Shape], device: str) -> None:
        self.parameters = make_parameters(shapes, device)
        self._gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._kept = [gradient.clone() for gradient in self._gradients]

    def groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, and vectors without; new ones, since optimizers write their options into them."""
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    @property
    def elements(self) -> int:
        """Number of all parameters."""
        return sum(p.numel() for p in self.parameters)

    def prepare(self, contender: str) -> None:
        """Put gradients where they belong before a step; in place, since a graph keeps their addresses."""
        if contender not in IN_MICRO_BATCHES:
            torch._foreach_copy_(self._gradients, self._kept)
            return
        torch._foreach_zero_(self._gradients)
        for share in MICRO_BATCHES:
            given = torch._foreach_mul(self._kept, share / len(MICRO_BATCHES))
            torch.autograd.backward(self.parameters, given)
