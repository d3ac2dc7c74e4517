"""The tests of the kernels, tests/gpu: compiled on a device, by Triton's interpreter in a rehearsal."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

from ..kernels.journal import read_journal
from ..kernels.page import hanging, verdict
from ..part import Failed, Part
from ..runner.environment import ROOT
from ..runner.processes import GRACE, run_until
from ..runner.results import last_line

__all__ = ["REHEARSAL", "run"]

MOST_PROCESSES = 14
"""Which compile side by side, for that takes most of the time; each holds about half a GB of the device."""

HANGS = 90.0
"""Seconds after which a test that still runs at the end hangs; half of the time, if that is less."""

REHEARSAL = "TRUSTRATIO_REHEARSE_GPU_TESTS"
"""Variable with which tests/gpu runs without a GPU, one case of each test."""


def run(part: Part) -> str:
    """Run the tests, and return the line for the summary; raise `Failed` with it if any test failed or hung."""
    lacking = [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]
    if lacking:
        raise Failed(f"{' and '.join(lacking)} cannot be imported, which the tests need")
    journal = part.output / "kernels-tests.jsonl"
    journal.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", *_side_by_side(part)]
    command += ["-p", "benchmarks.on_gpu.kernels.journal", "--journal", str(journal)]
    environment = {**os.environ, **({REHEARSAL: "1"} if part.rehearse else {})}
    seen = 0

    def record() -> None:
        nonlocal seen
        size = journal.stat().st_size if journal.exists() else 0
        if size != seen:
            part.record(**read_journal(journal))
            seen = size

    limit = part.left() - 2 * GRACE - 1
    end = run_until(command, part.output / "kernels-tests.log", limit, environment, ROOT, record)
    ended = time.time() - (2 * GRACE if end.stopped else 0.0)  # which it may have been given to end by itself
    found = read_journal(journal)
    part.record(**found, status=end.status, seconds_of_tests=round(end.seconds, 1))
    said = verdict(found, end.seconds, stopped=end.stopped)
    if end.stopped and (hung := hanging(found["running"], ended, min(HANGS, limit / 2))):
        raise Failed(f"{said}; {hung}")
    if found["failed"] or not found["passed"] or (end.status != 0 and not end.stopped):
        raise Failed(said if found["failed"] else f"{said}; pytest ended with status {end.status}{_why(part, found)}")
    return said


def _why(part: Part, found: dict[str, Any]) -> str:
    """Where pytest itself ended: in which tests, or what it said last."""
    if found["running"]:
        return f" in {', '.join(found['running'])}"
    log = part.output / "kernels-tests.log"
    return f": {last_line(log)[:200]}" if log.exists() else ""


def _side_by_side(part: Part) -> list[str]:
    """Several processes where pytest-xdist is installed: the tests of one file in several too."""
    if importlib.util.find_spec("xdist") is None:
        return []
    count = 2 if part.rehearse else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    return ["-n", str(count), "--max-worker-restart", "20"]
