"""All sweeps of a step: compiled ones for what they serve and know, tensor operations for everything that remains.

A compiled implementation serves some local tensors only (by dtype and device), and knows some stages and updates only.
So two things may remain: in a group whose stage or update it knows, the tensors that it does not serve; and whole
groups. With the implementation "eager" there is nothing compiled, and all remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..formulas.stages import Stage
from .eager import EagerSweeps
from .interface import ElementUpdate, Kernels, LocalSums, Operands, Sweeps

__all__ = ["CombinedSweeps"]


class CombinedSweeps:
    """See `Sweeps`; together they decline no stage and no update of the tensors that take part in a step.

    Attributes:
        served: Which local tensors compiled sweeps go over, in the groups that they know.
        compiled: None if they serve no tensor.
        remaining: Over the tensors beside those; None if there are none.
        whole: Over all tensors that take part, for groups that compiled sweeps do not know.
    """

    def __init__(self, kernels: Kernels | None, operands: Operands, takes_part: Sequence[bool], cache: dict[Any, Any]):
        self.operands = operands
        servable = [False] * len(takes_part) if kernels is None else kernels.serves(operands)
        self.served = [servable and wanted for servable, wanted in zip(servable, takes_part, strict=True)]
        self.compiled: Sweeps | None = None
        if kernels is not None and any(self.served):
            self.compiled = kernels.open(operands, self.served, cache)
        self.remaining: EagerSweeps | None = None
        if self.served != takes_part:
            unserved = [wanted and not served for wanted, served in zip(takes_part, self.served, strict=True)]
            self.remaining = EagerSweeps(operands, unserved, cache)
        self.whole = EagerSweeps(operands, takes_part, cache)

    def measure(self, group: int, stage: Stage, *, keep: bool) -> LocalSums:
        compiled = None if self.compiled is None else self.compiled.measure(group, stage, keep=keep)
        if compiled is None:
            return self.whole.measure(group, stage, keep=keep)
        if self.remaining is None:
            return compiled
        remaining = self.remaining.measure(group, stage, keep=keep)
        return LocalSums(remaining.of_layers + compiled.of_layers)

    def step(self, group: int, stage: Stage) -> LocalSums | None:
        if self.compiled is None or self.remaining is not None:
            return None
        sums = self.compiled.step(group, stage)
        if sums is not None:
            self._tell_autograd(group)
        return sums

    def apply(self, group: int, update: ElementUpdate) -> bool:
        if self.compiled is None or not self.compiled.apply(group, update):
            return self.whole.apply(group, update)
        self._tell_autograd(group)
        return self.remaining is None or self.remaining.apply(group, update)

    def _tell_autograd(self, group: int) -> None:
        """Compiled code writes weights without torch, which would raise if a graph still needed their old values."""
        tensors = self.operands.groups[group].tensors
        torch.autograd.graph.increment_version([self.operands.weights[t] for t in tensors if self.served[t]])
