"""Watches the steps of one optimizer, in one call or several each, and has those measured that are wanted."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.layout import LayoutError

from .clipping import clip_now
from .clips import Clips, clips_of
from .kept_layout import KeptLayout
from .measured_step import MeasuredStep, Reduced
from .shard_sums import ShardSums, Slots
from .steps_under_way import is_inner_step, watch_steps
from .together import together

__all__ = ["Observation"]


class Observation:
    """Steps of one optimizer, counted from now on.

    A step has ended when all tensors of it have been stepped; it was given up if one of them is stepped again before.
    One that an exception ends does not count, nor does one that a fused optimizer leaves out after an overflow.

    Args:
        kept: The optimizer and the layout of its steps.
        around: A wrapper whose `step()` is the whole step, and which runs no hooks; None if that is the optimizer's.
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
        around: Any,
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
        self._in_call = self._is_stepping = False
        self._call: frozenset[int] | None = None
        self._said: Sequence[Clips] = ()
        self._found_inf: torch.Tensor | None = None
        uncompiled = torch.compiler.disable
        whole, before = (kept.optimizer, self._begin_and_see) if around is None else (around, self._begin)
        self._handles = watch_steps(whole, before=uncompiled(before), after=uncompiled(self._end))
        if around is not None:
            self._handles += watch_steps(kept.optimizer, before=uncompiled(self._before))

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._step = self._sums = self._call = None

    def has_tensors(self) -> bool:
        """Whether it will be stepped: a chain may have optimizers of nothing, which are not."""
        return any(group["params"] for group in self._kept.optimizer.param_groups)

    def taken(self) -> int:
        """How many steps have ended; waits for the device where a fused optimizer has been told of an overflow."""
        is_skipped = self._found_inf is not None and bool(self._found_inf)
        return self.steps - self._in_call - is_skipped

    def is_under_way(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._in_call

    def _begin_and_see(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        self._begin(optimizer, args, kwargs)
        return self._before(optimizer, args, kwargs)

    @torch.no_grad()
    def _begin(self, whole: Any, args: Any, kwargs: Any) -> None:
        if is_inner_step(whole):
            return
        if self._in_call:  # the call before was ended by an exception
            self._give_up()
        if self._found_inf is not None and self._found_inf:
            self.steps -= 1
        self._in_call, self._is_stepping, self._call, self._found_inf = True, False, None, None
        tensors = {id(tensor) for group in self._kept.optimizer.param_groups for tensor in group["params"]}
        if not tensors or not self._stepped or not self._stepped.isdisjoint(tensors):
            self._begin_step()
        self._stepped |= tensors
        if self._measuring:
            self._resolve()
            assert self._sums is not None
            if self._step is None:
                self._step = MeasuredStep(self.steps, self._sums, self._kept.optimizer)
            self._call = frozenset(self._kept.of_call())
            self._step.before(self._call)

    @torch.no_grad()
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if is_inner_step(optimizer) or not self._in_call:
            return None
        self._is_stepping = True
        self._see(kwargs)
        return self._watch_closure(args, kwargs)

    def _see(self, kwargs: Any) -> None:
        """Measure the gradients of the call as they are now, and ask who has clipped them."""
        if self._call is None:
            return
        clip_now(self._kept.optimizer, kwargs)  # first, as it changes the gradients
        assert self._step is not None
        layout = self._step.layout
        by_call = clips_of(g for index in self._call if (g := layout.tensors[index].grad) is not None)
        by_wrapper = None if layout.clipped is None else Clips((layout.clipped(),))
        self._said = [clips for clips in (by_call, by_wrapper) if clips is not None]
        self._step.see_gradients(self._call, _scale(self._kept.optimizer))

    def _watch_closure(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """What `step` is called with, if a closure makes the gradients: it is measured what it has made at last."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self._call is None or not callable(closure):
            return None

        @functools.wraps(closure)
        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            with torch.no_grad():
                self._see(call)
            return loss

        call = kwargs
        if "closure" in kwargs:
            kwargs["closure"] = watched
            return args, kwargs
        return (args[0], watched, *args[2:]), kwargs

    @torch.no_grad()
    def _end(self, whole: Any, args: Any, kwargs: Any) -> None:
        if is_inner_step(whole):
            return
        if not self._is_stepping:  # the wrapper has left this step out
            self._give_up()
            return
        found_inf = _found_inf(self._kept.optimizer)
        if not self._measuring:
            self._found_inf = found_inf  # read when the next step begins, as it would wait for the device now
        elif found_inf is not None and found_inf:
            self._give_up()
            return
        self._in_call = self._is_stepping = False
        self._on_stepped()
        step, call, self._call = self._step, self._call, None
        if step is None or call is None:
            return
        step.after(call, self._said)
        step.stepped |= self._stepped
        if step.stepped >= self._kept.stepped:
            self._step = None
            assert self._slots is not None
            with together(self.steps):
                self.reduced = step.reduce(self._slots, _own_limit(self._kept.optimizer))
                self._kept.agree(self.reduced.norms())
            self._on_reduced()

    def _begin_step(self) -> None:
        if self._step is not None:
            warnings.warn(
                f"step {self._step.number} of {type(self._kept.optimizer).__name__} was not measured: a wrapper has "
                "stepped a part of its tensors only, and begun the next step",
                stacklevel=5,
            )
        self._step = None
        self.steps += 1
        self._stepped = set()
        self._measuring = self._wanted(self.steps)

    def _give_up(self) -> None:
        """Forget the step under way, as if it had not begun."""
        self.steps -= 1
        self._in_call, self._step, self._call, self._stepped = False, None, None, set()

    def _resolve(self) -> None:
        """Find the layout, if it is not known or tensors have changed since."""
        if self._sums is not None and self._kept.is_current():
            return
        if self._step is not None:
            raise LayoutError(
                f"the tensors of {type(self._kept.optimizer).__name__} have changed within a step: its norms cannot be "
                "measured"
            )
        with together(self.steps):
            self._sums = ShardSums(self._kept.resolve())
        self._slots = Slots(self._sums.layout)


def _scale(optimizer: Any) -> torch.Tensor | None:
    """By what GradScaler has multiplied gradients that a fused optimizer divides by it within its step."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, torch.Tensor) else None


def _found_inf(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """What GradScaler has told a fused optimizer, which does nothing in its step if that is not zero."""
    found = getattr(optimizer, "found_inf", None)
    return found if isinstance(found, torch.Tensor) else None


def _own_limit(optimizer: torch.optim.Optimizer) -> float | None:
    """To which norm an optimizer of ours clips the whole model's gradient within its step."""
    if not isinstance(optimizer, LayerwiseOptimizer):
        return None
    return next((group["max_grad_norm"] for group in optimizer.param_groups if group.get("max_grad_norm")), None)
