"""When a sample of the curvature is due, and how its two passes come about in each kind of loop.

wants_curvature()      a sample is due from here on: random numbers are noted
first pass             the loop's own. Where a wrapper shows gradients in step() alone, its step() is the end of it
curvature()            weights are moved at its beginning, or were in that step(); the batch is run again inside
its end, or the        weights are restored, what was measured is added to the averages
step() in it
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..sharding.backends import find_repeated_step
from ..sharding.layout import LayoutError
from ..sharding.repeated_step import RepeatedStep
from ..stepping.count import most_steps
from ..stepping.plan import Plan
from .random_numbers import RandomNumbers
from .sample import Sample, Sampled
from .signs import labels_of, signs

__all__ = ["Sampler"]

TWICE = (
    "run the same batch again inside `with optimizer.curvature():` after wants_curvature() was true, also where the "
    "wrapper's own step() belongs to a pass"
)
LAST_SAMPLE = "last_sample"
"""Key of every group: the number of the step, from 1, that had the last sample; 0 before the first."""
NOTHING = Sampled(*torch.zeros(3, device="cpu"))
SAME = (
    "both passes of a sample of the curvature had the same gradients to the bit, so the sample does not count: the "
    "second one did not see that the weights were moved, or the loss is linear. Run the whole forward again inside "
    "curvature(), with nothing kept that was computed from the weights; where that is so, interval=None saves the pass"
)
SAME_NORM, NO_CHANGE = 3e-7, 1e-4
"""Relative. Gradients that are clipped have norms as near as that; two that hardly differ say nothing."""


class Sampler:
    """The samples of one optimizer; each method is given it.

    Attributes:
        is_inside: Whether the second pass is under way.
    """

    def __init__(self) -> None:
        self.is_inside = False
        self._random: RandomNumbers | None = None  # while a sample is wanted
        self._wrapper: RepeatedStep | None = None
        self._has_asked = False
        self._begun: dict[tuple[int, ...], Sample] = {}
        self._measured: list[Sampled] = []
        self._release: Callable[[bool], None] | None = None
        self._looked_alike = self._has_warned = False
        self._number = -1  # of the sample that is under way

    # Before the first pass

    def want(self, optimizer: Any) -> bool:
        """Whether a sample is due; if it is, one is wanted from now on."""
        self.refuse_moved("wants_curvature()")
        if self.is_inside:
            raise RuntimeError("wants_curvature() was called inside curvature(): call it before the first pass")
        self.give_up()
        if not self.is_due(optimizer):
            return False
        self._ask_wrapper(optimizer)
        self._random = RandomNumbers(_devices(optimizer))
        self._release = None if self._wrapper is None else self._wrapper.hold()
        return True

    def _ask_wrapper(self, optimizer: Any) -> None:
        """Find out, once as long as it is there, whether a wrapper's step() belongs to a pass."""
        if not self._has_asked or (self._wrapper is not None and not self._wrapper.is_in_use()):
            self._wrapper, self._has_asked = find_repeated_step(optimizer), True

    def is_due(self, optimizer: Any) -> bool:
        """Whether the step that is to come should have one: every `interval` steps, or later where that was lost."""
        groups = optimizer.param_groups
        interval, steps = groups[0]["interval"], most_steps(groups)
        if interval is None:
            return False
        last = max(int(group.get(LAST_SAMPLE, 0)) for group in groups)
        return not steps - steps % interval < last <= steps + 1

    def give_up(self) -> None:
        """Want none any more; the next step is wanted to have one instead."""
        self._random = None
        self._let_go(is_repeated=False)

    def _let_go(self, is_repeated: bool) -> None:
        release, self._release = self._release, None
        if release is not None:
            release(is_repeated)

    def refuse_moved(self, what: str) -> None:
        """Raise RuntimeError if weights are moved and somebody does what needs them where they belong."""
        for sample in self._begun.values():
            sample.refuse_lost()
        if self._begun:
            raise RuntimeError(f"{what} found the weights moved for a sample of the curvature: {TWICE}")

    # Where a wrapper's step() ends a pass

    def ends_first_pass(self) -> bool:
        """Whether the `step()` that is being called only ends the first pass."""
        return self._random is not None and self._wrapper is not None and not self.is_inside

    def begin(self, optimizer: Any, plan: Plan) -> None:
        """Keep the gradient of one `step()` call and move its weights."""
        key = _key(plan)
        if key in self._begun:
            self.abandon()
            raise RuntimeError(f"a second step() without the second pass of a sample of the curvature: {TWICE}")
        assert self._wrapper is not None
        self._begin(optimizer, plan, 1 / self._wrapper.gradient_factor(), publish=False)

    def _begin(self, optimizer: Any, plan: Plan, scale: float | torch.Tensor, *, publish: bool) -> None:
        _refuse_layout(optimizer, plan)
        labels = plan.cache.setdefault("labels", labels_of(optimizer, plan.layout.layers))
        self._number = most_steps(optimizer.param_groups)
        sample = self._begun[_key(plan)] = Sample(optimizer, plan)
        sample.begin(signs(int(optimizer.param_groups[0]["seed"]), self._number, labels), scale, publish=publish)

    @contextmanager
    def ended(self, optimizer: Any, plan: Plan) -> Iterator[None]:
        """Measure what a `step()` call of the second pass brings; inside, the gradient is that of the first."""
        if self._wrapper is None:
            self.refuse_moved("step()")
        key = _key(plan)
        if key not in self._begun:  # the wrapper has left out the first one, as for an overflow
            yield
            return
        assert self._wrapper is not None
        second = [tensor.grad for tensor in plan.tensors]
        self._end(key, 1 / self._wrapper.gradient_factor(), publish=False)
        try:
            yield
        finally:
            for tensor, gradient in zip(plan.tensors, second, strict=True):
                tensor.grad = gradient

    # The second pass

    @contextmanager
    def second_pass(self, optimizer: Any, loss_scale: float | torch.Tensor) -> Iterator[None]:
        """The same batch is run inside, at moved weights."""
        if self._random is None:
            raise RuntimeError("no sample of the curvature is wanted: call wants_curvature() before the first pass")
        random, self._random = self._random, None
        self._let_go(is_repeated=True)
        if self._wrapper is None:
            self._begin(optimizer, optimizer.plan_of_step(), 1 / loss_scale, publish=True)
            optimizer.clear_gradients()
        self.is_inside = True
        try:
            with random.again():
                yield
            if self._wrapper is None:
                self._end(next(iter(self._begun)), 1 / loss_scale, publish=True)
            self._judge(optimizer)
        finally:
            self.is_inside, self._measured = False, []
            self.abandon()

    def _end(self, key: tuple[int, ...], scale: float | torch.Tensor, *, publish: bool) -> None:
        sampled = self._begun[key].end(scale, publish=publish)  # and stays, if its weights are lost
        del self._begun[key]
        self._measured.append(sampled or NOTHING)

    def _judge(self, optimizer: Any) -> None:
        """Note that the sample was taken, and warn once of one that says nothing. Waits for the device."""
        if not self._measured:  # the wrapper has left the step out
            return
        calls = [(one.first, one.second, one.difference) for one in self._measured]
        first, second, difference = (math.sqrt(sum(map(float, squares))) for squares in zip(*calls, strict=True))
        if difference == 0 < first < math.inf and not self._has_warned:
            self._has_warned = True
            warnings.warn(SAME, stacklevel=5)
        # Else another one is wanted, as the step may be left out. A wrapper has judged by itself.
        if self._wrapper is not None or all(map(math.isfinite, (first, second, difference))):
            self._note_sample(optimizer)
        if self._wrapper is None:
            self._refuse_clipping(first, second, difference)

    def _note_sample(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group[LAST_SAMPLE] = self._number + 1

    def restart(self) -> None:
        """Go on from what a checkpoint says: nothing of the sample that is wanted counts."""
        self.give_up()
        self._looked_alike = False

    def forget_lost(self) -> None:
        """Forget a sample whose weights cannot be restored, as others are loaded."""
        if any(sample.is_lost for sample in self._begun.values()):
            self._begun = {}

    def abandon(self) -> None:
        """Restore all weights that are moved, and forget the sample.

        Raises:
            RuntimeError: If somebody has changed them; then it stays.
        """
        for key, sample in list(self._begun.items()):
            sample.restore(publish=len(self._begun) == 1)
            if self._wrapper is None:
                sample.put_gradient_back()
            del self._begun[key]

    def _refuse_clipping(self, first: float, second: float, difference: float) -> None:
        """Raise RuntimeError if both gradients were clipped to one norm, in two samples one after the other.

        Once may be chance.
        """
        alike = abs(first - second) <= SAME_NORM * first and difference > NO_CHANGE * first
        refused, self._looked_alike = alike and self._looked_alike, alike
        if refused:
            raise RuntimeError(
                "the gradients of both passes of a sample of the curvature have the same norm, as clipping leaves "
                "them, and their difference is no curvature then: leave clipping out of the closure, and clip after "
                "curvature(), before step()"
            )


def _key(plan: Plan) -> tuple[int, ...]:
    return tuple(map(id, plan.tensors))


def _devices(optimizer: Any) -> set[torch.device]:
    """Where the model may draw random numbers, besides the CPU: offloaded parameters do not tell."""
    devices = {parameter.device for parameter in optimizer.given_parameters()}
    if torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return {device for device in devices if device.type not in ("cpu", "meta")}


def _refuse_layout(optimizer: Any, plan: Plan) -> None:
    if plan.layout.others is not None:
        raise LayoutError(
            f"{plan.layout.backend} steps other layers on every rank and sends weights in its own step() alone, so "
            f"that {type(optimizer).__name__} cannot move them for a sample of the curvature: use ZeRO-1 or "
            "fully_shard, or set interval=None"
        )
