"""Watches the steps of one optimizer, in one call or several each, and has those measured that are wanted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.layout import LayoutError

from .clipping import clip_now
from .kept_layout import KeptLayout
from .measured_step import MeasuredStep, Reduced
from .shard_sums import ShardSums, Slots
from .steps_under_way import is_inner_step

__all__ = ["Observation"]


class Observation:
    """Steps of one optimizer, counted from now on.

    A step has ended when all tensors of it have been stepped; it was given up if one of them is stepped again before.

    Args:
        kept: The optimizer and the layout of its steps.
        wanted: Whether a step is measured, by its number; asked when it begins, and answers alike on all ranks.
        on_reduced: Called after a measured step has been reduced.
        on_stepped: Called after every step.

    Attributes:
        steps: How many have begun.
        reduced: The last measured step, None before the first.
    """

    def __init__(
        self,
        kept: KeptLayout,
        wanted: Callable[[int], bool],
        on_reduced: Callable[[], None],
        on_stepped: Callable[[], None],
    ):
        self.steps = 0
        self.reduced: Reduced | None = None
        self._kept = kept
        self._wanted = wanted
        self._measuring = False
        self._on_reduced = on_reduced
        self._on_stepped = on_stepped
        self._stepped: set[int] = set()  # ids of the tensors of the step under way
        self._sums: ShardSums | None = None
        self._slots: Slots | None = None
        self._step: MeasuredStep | None = None
        self._call: frozenset[int] | None = None
        self._handles = [
            kept.optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            kept.optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
        ]

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._step = self._sums = self._call = None

    def has_tensors(self) -> bool:
        """Whether it will be stepped: a chain may have optimizers of nothing, which are not."""
        return any(group["params"] for group in self._kept.optimizer.param_groups)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if is_inner_step(optimizer):
            return
        self._call = None
        tensors = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if not tensors or not self._stepped or not self._stepped.isdisjoint(tensors):
            self._begin()
        self._stepped |= tensors
        if not self._measuring:
            return
        clipped = clip_now(optimizer)  # first, as it changes the gradients
        self._resolve()
        assert self._sums is not None
        if self._step is None:
            self._step = MeasuredStep(self.steps, self._sums)
        by_wrapper = self._sums.layout.clipped
        said = [clipped, None if by_wrapper is None else by_wrapper()]
        self._step.clipped += [one for one in said if one is not None]
        self._call = frozenset(self._kept.of_call())
        self._step.before(self._call)
        if _closure(args, kwargs) is None:
            self._step.see_gradients(self._call, _scale(optimizer))

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if is_inner_step(optimizer):
            return
        self._on_stepped()
        step, call = self._step, self._call
        if step is None or call is None:
            return
        if _closure(args, kwargs) is not None:  # which has made the gradients
            step.see_gradients(call, _scale(optimizer))
        step.after(call)
        step.stepped |= self._stepped
        self._call = None
        if step.stepped >= self._kept.stepped:
            self._step = None
            assert self._slots is not None
            self.reduced = step.reduce(self._slots, _own_limit(optimizer))
            self._on_reduced()

    def _begin(self) -> None:
        if self._step is not None:
            warnings.warn(
                f"step {self._step.number} of {type(self._kept.optimizer).__name__} was not measured: a wrapper has "
                "stepped a part of its tensors only, and begun the next step",
                stacklevel=4,
            )
        self._step = None
        self.steps += 1
        self._measuring = self._wanted(self.steps)
        self._stepped = set()

    def _resolve(self) -> None:
        """Find the layout, if it is not known or tensors have changed since."""
        if self._sums is not None and self._kept.is_current():
            return
        if self._step is not None:
            raise LayoutError(
                f"the tensors of {type(self._kept.optimizer).__name__} have changed within a step: its norms cannot be "
                "measured"
            )
        self._sums = ShardSums(self._kept.resolve())
        self._slots = Slots(self._sums.layout)


def _closure(args: Any, kwargs: Any) -> Any:
    """The closure that `step` was called with, which hooks get with the optimizer before it."""
    given = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return given if callable(given) else None


def _scale(optimizer: Any) -> torch.Tensor | None:
    """By what GradScaler has multiplied gradients that a fused optimizer divides by it within its step."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, torch.Tensor) else None


def _own_limit(optimizer: torch.optim.Optimizer) -> float | None:
    """To which norm an optimizer of ours clips the whole model's gradient within its step."""
    if not isinstance(optimizer, LayerwiseOptimizer):
        return None
    return next((group["max_grad_norm"] for group in optimizer.param_groups if group.get("max_grad_norm")), None)
