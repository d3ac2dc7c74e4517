"""How long each stage of a run takes: on the clock, and of processor time."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

_LEAST = 0.1  # seconds of a stage that is shown
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "accelerate")


@dataclass
class Stage:
    """Seconds on the clock, and of processor time of this process and the workers that it has seen end."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Stages:
    """Adds up stages by name, in the order in which they were first entered.

    A stage within another one is taken out of the outer one's time, and what is in none is the rest, so that the
    seconds of all add up to the whole.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self.taken: dict[str, Stage] = {}
        self._rest = Stage()
        self._open: list[str] = []
        self._seen = (time.perf_counter(), cpu_seconds())

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the block as the stage `name`."""
        self._count()
        self._open.append(name)
        self.taken.setdefault(name, Stage())
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def add_start(self) -> None:
        """Count what came before: the command that started this process, if any, and its imports until now."""
        process = psutil.Process()
        launchers = [parent for parent in process.parents() if _is_launcher(parent)]
        if launchers:
            times = [parent.cpu_times() for parent in launchers]
            spent = sum(each.user + each.system for each in times)
            self.taken["launcher"] = Stage(process.create_time() - launchers[-1].create_time(), spent)
        self.taken["imports"] = Stage(time.time() - process.create_time(), cpu_seconds())

    def seconds(self) -> float:
        """Return the seconds on the clock until now."""
        return sum(stage.seconds for stage in self.all().values())

    def all(self) -> dict[str, Stage]:
        """Return the stages until now by name, and the rest."""
        self._count()
        return {**self.taken, "rest": self._rest}

    def describe(self) -> str:
        """Return one line with the stages that took a tenth of a second."""
        shown = [f"{name} {_shown(stage.seconds)}" for name, stage in self.all().items() if stage.seconds >= _LEAST]
        return f"stages: {', '.join(shown)}"

    def _count(self) -> None:
        now = (time.perf_counter(), cpu_seconds())
        stage = self.taken[self._open[-1]] if self._open else self._rest
        stage.seconds += now[0] - self._seen[0]
        stage.cpu_seconds += now[1] - self._seen[1]
        self._seen = now


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _is_launcher(process: psutil.Process) -> bool:
    try:
        # The interpreter and its program: what follows are the arguments, which say anything.
        return any(name in text for text in process.cmdline()[:5] for name in _LAUNCHERS)
    except psutil.Error:
        return False


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
