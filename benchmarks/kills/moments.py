"""What is killed, and when: moments drawn from a seed and then waited for in a living run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.kills.runs import CHECKPOINTS, LAST, Life, Run, variables

MOMENTS = {
    "any": "at any time of an undisturbed run",
    "start": "before its data are known",
    "data": "while data are prepared",
    "step": "during an update",
    "checkpoint": "while a checkpoint is written",
    "report": "after the last checkpoint, while the report is drawn",
    "resume": "while a checkpoint is resumed",
}
TARGETS = {
    "first rank": "the first rank",
    "last rank": "the last rank",
    "all": "launcher and ranks",
    "launcher": "the launcher alone",
    "inner launcher": "the launcher's own launcher, which DeepSpeed's has, alone",
}
_WRITING_SECONDS = 0.1  # within which a checkpoint of these runs is written
_STEP_SECONDS = 0.05


@dataclass(frozen=True)
class Timeline:
    """When an undisturbed run came to what, in seconds since its start.

    Attributes:
        prepared: its data were known.
        opened: its output folder was.
        saved: its last checkpoint was written.
        ended: the launcher ended.
    """

    prepared: float
    opened: float
    saved: float
    ended: float

    @classmethod
    def of(cls, life: Life) -> Timeline:
        """Read off an undisturbed life that has ended."""
        marks = [life.seen(text) for text in ("data: ", "output folder: ", f"step {LAST}: checkpoint")]
        prepared, opened, saved = (mark or life.seconds for mark in marks)
        return cls(prepared, opened, saved, life.seconds)


@dataclass(frozen=True)
class Kill:
    """One kill as it is planned.

    Attributes:
        moment: of `MOMENTS`.
        target: of `TARGETS`.
        number: of the checkpoint or update in this life, from 1.
        share: in [0, 1): how far into the moment.
        at_once: whether the run is started again without waiting for processes that the kill left behind.
    """

    moment: str
    target: str
    number: int
    share: float
    at_once: bool

    @classmethod
    def drawn(cls, generator: random.Random, life: int) -> Kill:
        """Draw a kill for a run's life number `life`, from 1."""
        weights = {"any": 3, "start": 1, "data": 3, "step": 2, "checkpoint": 4, "report": 2, "resume": 0}
        if life > 1:
            weights |= {"start": 0, "data": 0, "resume": 4}
        moment = generator.choices(list(weights), list(weights.values()))[0]
        target = generator.choices(list(TARGETS), [3, 2, 3, 2, 1])[0]
        most = CHECKPOINTS - 1 if moment == "checkpoint" else LAST - 2
        return cls(moment, target, generator.randint(1, most), generator.random(), generator.random() < 0.5)

    def wait(self, run: Run, life: Life, timeline: Timeline) -> bool:
        """Wait for the moment; return False if the run ended before it came."""
        happened, delay = self._condition(run, life, timeline)
        if not life.wait(happened):
            return False
        due = life.seconds + self.share * delay
        life.wait(lambda: life.seconds >= due or self._is_over(run, life))
        return True  # a launcher that has ended by now may have left ranks, or another process to kill

    def _condition(self, run: Run, life: Life, timeline: Timeline) -> tuple[Callable[[], bool], float]:
        """Return what the moment begins with, and how long it lasts in seconds."""
        if self.moment == "data":
            return lambda: any(run.cache.glob("tokens-*/settings.json")), min(1.0, timeline.prepared / 4)
        if self.moment == "step":
            first = _lines(run)
            return lambda: _lines(run) >= first + self.number, _STEP_SECONDS
        if self.moment == "checkpoint":
            return _count_partial(run.output / "checkpoints", self.number), _WRITING_SECONDS
        if self.moment == "report":
            return lambda: life.seen(f"step {LAST}: checkpoint") is not None, timeline.ended - timeline.saved
        if self.moment == "resume":
            return lambda: life.seen("data: ") is not None, max(0.5, 2 * (timeline.opened - timeline.prepared))
        return lambda: True, timeline.prepared if self.moment == "start" else timeline.ended

    def _is_over(self, run: Run, life: Life) -> bool:
        """Tell whether the moment passes, faster than in the undisturbed run: the machine may have less to do now."""
        if self.moment == "start":
            return life.seen("data: ") is not None
        if self.moment == "data":
            return any(run.cache.glob("tokens-*/manifest.json"))
        if self.moment == "resume":
            return life.seen(f"/{LAST}: loss") is not None
        return self.moment == "report" and life.seen(" steps done; ") is not None

    def strike(self, run: Run, life: Life) -> list[str]:
        """Kill the target, or all there is where it does not live yet; return the roles of what was killed."""
        found = processes_by_role(run, life)
        target = "launcher" if self.target == "inner launcher" and self.target not in found else self.target
        if target in found:
            victims, killed = [found[target]], [target]
        else:  # the launcher first: it would end the ranks itself
            victims = [*found.values(), *run.processes()]
            killed = ["all"] if victims else []
        for process in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return killed


def processes_by_role(run: Run, life: Life) -> dict[str, int]:
    """Return the ids of this life's launchers and ranks that live, the outer launcher first."""
    found = {} if life.process.poll() is not None else {"launcher": life.process.pid}
    others: dict[str, int] = {}
    for process in run.processes():
        with contextlib.suppress(psutil.Error):
            inner = "deepspeed.launcher.launch" in psutil.Process(process).cmdline()
            parent = psutil.Process(process).ppid()
            rank = variables(process).get("RANK")
            if inner:
                found["inner launcher"] = process
            elif rank is not None and "RANK" not in variables(parent):  # no worker process of a rank
                others["first rank" if rank == "0" else "last rank"] = process
    return {**found, **others}


def _lines(run: Run) -> int:
    try:
        return (run.output / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _count_partial(folder: Path, number: int) -> Callable[[], bool]:
    """Return what tells whether the checkpoint of this number has been begun, called over and over again."""
    seen: set[str] = {path.name for path in folder.glob("*.partial")}
    old = len(seen)

    def begun() -> bool:
        seen.update(path.name for path in folder.glob("*.partial"))
        return len(seen) - old >= number

    return begun


def wait_for_end(run: Run, seconds: float) -> float | None:
    """Wait until no process of a run lives; return how long that took, None if some still do."""
    began = time.monotonic()
    while run.processes():
        if time.monotonic() - began > seconds:
            return None
        time.sleep(0.05)
    return time.monotonic() - began


def end_all(run: Run) -> None:
    """Kill whatever lives of a run."""
    for process in run.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
