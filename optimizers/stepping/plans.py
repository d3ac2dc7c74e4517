"""The plans of an optimizer's `step()` calls, and what the calls of the last step have reported.

A wrapper may step group by group, or sub-group by sub-group: then several calls, of other tensors each, are one step.
Nobody says where a step ends. It has ended when a tensor is stepped again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.device_copies import is_capturing
from .plan import Plan

__all__ = ["Plans"]

Key = tuple[int, ...]


@dataclass(frozen=True)
class _Call:
    """One `step()` call of the last step: its plan, and the trust ratio of each layer, as `Plan.names` has them."""

    plan: Plan
    ratios: torch.Tensor


class Plans:
    """Those that the last step has used, by the ids of the tensors of a call, and the ones of the step under way.

    A plan holds its tensors, so a parameter that is stepped no more is given up with the plan of its last step. Plans
    that a CUDA graph was captured with stay: replays read their numbers, and nobody tells when a graph is gone.

    Attributes:
        steps_begun: How many steps have begun so far.
    """

    def __init__(self) -> None:
        self.steps_begun = 0
        self._plans: dict[Key, Plan] = {}
        self._calls: dict[Key, _Call | None] = {}  # of the last step; None while the call is under way
        self._is_over = False
        self._captured: dict[int, Plan] = {}

    def values(self) -> Iterator[Plan]:
        """Yield all plans."""
        yield from self._plans.values()

    def clear(self) -> None:
        """Give up all plans; what is known of the last step stays until the next one."""
        self._plans.clear()
        self._is_over = True

    def find(self, tensors: Sequence[torch.Tensor], options: Any) -> Plan | None:
        """The plan of a call with these tensors, None if there is none that fits them and the options still."""
        plan = self._plans.get(_key(tensors))
        return plan if plan is not None and plan.fits(tensors, options) else None

    def add(self, plan: Plan) -> None:
        """Keep a new plan, in place of those that have any of its tensors."""
        tensors = set(key := _key(plan.tensors))
        outdated = [known for known in self._plans if known == key or not tensors.isdisjoint(known)]
        for known in outdated:
            del self._plans[known]
            self._is_over |= known in self._calls
        self._plans[key] = plan

    def begin(self, plan: Plan) -> None:
        """Note that a call begins; the first one of a step, if its tensors were in a call of the last step already."""
        key = _key(plan.tensors)
        if self._is_over or key in self._calls or not self._calls:
            self.steps_begun += 1
            self._plans = {known: kept for known, kept in self._plans.items() if known in self._calls or known == key}
            self._calls.clear()
            self._is_over = False
        self._calls[key] = None

    def end(self, plan: Plan, ratios: torch.Tensor) -> None:
        """Keep what a call has reported, and its plan if it was captured in a CUDA graph."""
        if is_capturing(plan.layout.device):
            self._captured[id(plan)] = plan
        self._calls[_key(plan.tensors)] = _Call(plan, ratios)

    def ratios(self) -> tuple[list[str], torch.Tensor]:
        """The layers of the last step, of all its calls, and their trust ratios, shape (layers,), fp64."""
        calls = self._complete_calls()
        if not calls:
            return [], torch.zeros(0, dtype=torch.float64, device="cpu")
        return [name for call in calls for name in call.plan.names], torch.cat([call.ratios for call in calls])

    def adapted_layers(self) -> set[str]:
        """Of these layers, those that the ratio scales."""
        return {name for call in self._complete_calls() for name in call.plan.adapted_layers}

    def _complete_calls(self) -> list[_Call]:
        return [call for call in self._calls.values() if call is not None]


def _key(tensors: Sequence[torch.Tensor]) -> Key:
    return tuple(map(id, tensors))
