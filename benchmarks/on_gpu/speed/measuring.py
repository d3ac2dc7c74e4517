"""One batch of contenders on one subject: times, launches and memory, each told as soon as it is there."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.contenders import BASELINE, COPY, Contender
from benchmarks.dense import make_steps
from benchmarks.memory import peak_above
from benchmarks.timing import Timing, alternate

from .contenders import BYTES, IN_MICRO_BATCHES, ours_with
from .devices import Device
from .subject import Subject

__all__ = ["Rounds", "measure_batch", "measure_graph"]

Rows = dict[str, Any]
Steps = Mapping[str, Callable[[], object]]
FIRST_STEPS = 2  # state is made and tables are sent; what is wrong with the first is raised by the second at the latest
MOST_AHEAD = 0.05  # seconds


class Rounds(NamedTuple):
    """How often each clock runs each contender.

    Attributes:
        counted: Rounds that count.
        before: Rounds that do not, first.
    """

    counted: int
    before: int


def measure_batch(
    subject: Subject,
    contenders: Sequence[Contender],
    kind: str,
    device: Device,
    rounds: Rounds,
    tell: Callable[[Rows], None],
) -> Rows:
    """Measure all in turn.

    Args:
        subject: What they step.
        contenders: The baseline among them.
        kind: Of the device, for torch.
        device: To measure with.
        rounds: See there.
        tell: Called with the rows so far, whenever there is more of them.

    Returns:
        By name `milliseconds` and what else `Timing.summary` has, on a device that is busy when the step begins;
        `alone` and `host`, the same from an idle device and until the call returns; bytes per parameter and shares of
        the copy's bandwidth, launches, extra memory. Or `missing`.
    """
    return _Batch(subject, kind, device, rounds, tell).measure(contenders)


class _Batch:
    def __init__(
        self, subject: Subject, kind: str, device: Device, rounds: Rounds, tell: Callable[[Rows], None]
    ) -> None:
        self.subject, self.kind, self.device, self.rounds, self.tell = subject, kind, device, rounds, tell
        self.rows: Rows = {}

    def measure(self, contenders: Sequence[Contender]) -> Rows:
        steps, missing = make_steps(contenders, self.subject.groups, self.subject.prepare, FIRST_STEPS)
        self._add({**{c.name: {"kind": c.kind} for c in contenders if c.name in steps}, **missing})
        if steps:
            self._time(steps)
        for name, step in steps.items():
            self._count(name, step)
        del steps
        gc.collect()
        return self.rows

    def _time(self, steps: Steps) -> None:
        host = self._turns(steps, self.device.host)
        self._add({name: {"host": timing.summary()} for name, timing in host.items()})
        alone = self._turns(steps, self.device.alone)
        self._add({name: {"alone": timing.summary()} for name, timing in alone.items()})
        ahead = min(MOST_AHEAD, 1.5 * max(statistics.median(timing.seconds) for timing in host.values()))
        queued = self._turns(steps, lambda work: self.device.queued(work, ahead))
        copies = queued[COPY].seconds if COPY in queued else None
        for name, timing in queued.items():
            self._add({name: {**timing.summary(), **_bytes(name, timing.seconds, copies)}})

    def _turns(self, steps: Steps, clock: Callable[[Callable[[], object]], float]) -> dict[str, Timing]:
        baseline = BASELINE if BASELINE in steps else next(iter(steps))
        return alternate(steps, baseline, *self.rounds, self.subject.prepare, clock)

    def _count(self, name: str, step: Callable[[], object]) -> None:
        for what, count in (("launches", self.device.launches), ("extra_bytes", self._memory)):
            self.subject.prepare(name)
            self._add({name: {what: _or_why_not(partial(count, step))}})

    def _memory(self, step: Callable[[], object]) -> int:
        return peak_above(step, self.kind)

    def _add(self, rows: Rows) -> None:
        for name, row in rows.items():
            self.rows.setdefault(name, {}).update(row)
        self.tell(self.rows)


def measure_graph(name: str, subject: Subject, kind: str, device: Device, rounds: Rounds) -> Rows:
    """A step of one of ours as a CUDA graph: milliseconds of the device and of the host for a replay, or `missing`."""
    if name in IN_MICRO_BATCHES:
        return {"missing": "its step asks, on the host, what backward has seen since the last one"}
    try:
        lr = torch.tensor(1e-3, device=kind)
        step = ours_with(name, lr)(subject.groups()).step
        for _ in range(FIRST_STEPS):
            subject.prepare(name)
            step()
        replay = device.capture(step)
        clocks = {"milliseconds": lambda work: device.queued(work, 1e-3), "host_milliseconds": device.host}
        return {what: _median_of_replays(replay, name, subject, rounds, clock) for what, clock in clocks.items()}
    except Exception as error:
        return {"missing": _said(error)}


def _median_of_replays(
    replay: Callable[[], object], name: str, subject: Subject, rounds: Rounds, clock: Callable[..., float]
) -> float:
    timings = alternate({name: replay}, name, *rounds, subject.prepare, clock)
    return 1e3 * statistics.median(timings[name].seconds)


def _bytes(name: str, seconds: Sequence[float], copies: Sequence[float] | None) -> Rows:
    """Bytes per parameter that a copy moves in the time, that the step moves, where known, and their ratio."""
    if copies is None:
        return {}
    copied = statistics.median(BYTES[COPY] * own / copy for own, copy in zip(seconds, copies, strict=True) if copy)
    moved = BYTES.get(name)
    share = {"bytes_per_parameter": moved, "share_of_copy": moved / copied} if moved and copied else {}
    return {"copied_bytes_per_parameter": copied, **share}


def _or_why_not(count: Callable[[], Any]) -> Any:
    try:
        return count()
    except Exception as error:
        return {"missing": _said(error)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
