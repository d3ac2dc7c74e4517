"""Sharded steps on one device against a float64 reference: NCCL with one rank, gloo with two, and memcheck."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.machine import describe_machine

from ..part import Failed, Part
from ..sharded.crews import RunningCrew
from ..sharded.page import is_good, tables, verdict
from ..sharded.sanitizer import Memcheck
from ..sharded.settings import BOUND, CREWS, Crew

__all__ = ["run", "tables"]

RESERVE = 4.0
"""Seconds at the end in which what still runs is stopped."""


def run(part: Part) -> str:
    """Train all settings, one crew beside the other, and return the line for the summary.

    Raises:
        Failed: With that line, if a setting is not exact or failed, memcheck found something, or nothing was compared.
    """
    optional = [crew.name for crew in CREWS if crew.optional]
    part.record(machine=describe_machine(part.device), bound=BOUND, optional=optional)
    part.record(crews={}, memcheck={}, did_not_fit=[])
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        crews = [_started(crew, part, Path(folder), stack) for crew in CREWS]
        memcheck = Memcheck(part.device, part.output / "sharded-memcheck.log")
        stack.callback(memcheck.end)
        _watch(part, crews, memcheck)
        _record(part, crews, memcheck)
        unfinished = [f"{crew.crew.name}: {name}" for crew in crews for name in crew.todo] + memcheck.todo
        part.record(did_not_fit=unfinished)
        part.record(verdict=verdict(part.found))  # before what hangs is ended, which may hang
    if not is_good(part.found):
        raise Failed(verdict(part.found))
    return verdict(part.found)


def _watch(part: Part, crews: list[RunningCrew], memcheck: Memcheck) -> None:
    """Record what comes out, until all has or the time is over."""
    running: list[RunningCrew | Memcheck] = [*crews, memcheck]
    while part.left() > RESERVE and not all(one.done for one in running):
        news = [one.poll() for one in running]
        if any(news):
            _record(part, crews, memcheck)
        time.sleep(0.1)


def _record(part: Part, crews: list[RunningCrew], memcheck: Memcheck) -> None:
    part.record(crews={crew.crew.name: crew.found for crew in crews}, memcheck=memcheck.found)


def _started(crew: Crew, part: Part, folder: Path, stack: ExitStack) -> RunningCrew:
    own = folder / crew.backend
    own.mkdir()
    running = RunningCrew(crew, part.device, part.output / f"sharded-{crew.backend}.log", own)
    stack.callback(running.end)
    return running
