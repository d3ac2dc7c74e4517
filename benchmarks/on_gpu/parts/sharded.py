"""Sharded steps on one device against a float64 reference: NCCL with one rank, gloo with two, and memcheck."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.machine import describe_machine

from ..part import Part
from ..sharded.crews import RunningCrew
from ..sharded.page import tables, verdict
from ..sharded.sanitizer import Memcheck
from ..sharded.settings import BOUND, CREWS, Crew

__all__ = ["run", "tables"]

RESERVE = 4.0
"""Seconds at the end in which what still runs is stopped."""


def run(part: Part) -> str:
    """Train all settings, one crew beside the other, and return the line for the summary."""
    part.record(machine=describe_machine(part.device), bound=BOUND, crews={}, memcheck={}, did_not_fit=[])
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        crews = [
            RunningCrew(
                crew, part.device, part.output / f"sharded-{crew.backend}.log", _made(Path(folder), crew.backend)
            )
            for crew in CREWS
        ]
        memcheck = Memcheck(part.device, part.output / "sharded-memcheck.log")
        try:
            _watch(part, crews, memcheck)
        finally:
            for one in (*crews, memcheck):
                one.end()
    unfinished = [f"{crew.crew.name}: {name}" for crew in crews for name in crew.todo] + memcheck.todo
    part.record(did_not_fit=unfinished)
    return verdict(part.found)


def _watch(part: Part, crews: list[RunningCrew], memcheck: Memcheck) -> None:
    """Record what comes out, until all has or the time is over."""
    while part.left() > RESERVE and not all(one.done for one in (*crews, memcheck)):
        news = [one.poll() for one in (*crews, memcheck)]
        if any(news):
            part.record(crews={crew.crew.name: crew.found for crew in crews}, memcheck=memcheck.found)
        time.sleep(0.1)


def _started(crew: Crew, part: Part, folder: Path) -> RunningCrew:
    own = folder / crew.backend
    own.mkdir()
    return RunningCrew(crew, part.device, part.output / f"sharded-{crew.backend}.log", own)
