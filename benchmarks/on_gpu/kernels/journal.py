"""A plugin of pytest that writes JSON lines as each test begins and ends: whatever stops the tests, these are kept.

python -m pytest -p benchmarks.on_gpu.kernels.journal --journal FILE tests/gpu
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Journal", "read_journal"]

_LONGEST = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="file that gets a line for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--journal")
    if path is not None and not hasattr(config, "workerinput"):  # what workers report comes to the first process
        config.pluginmanager.register(Journal(path), "journal")


class Journal:
    """Writes the file."""

    def __init__(self, path: Path):
        self.path = path
        self.collected = 0
        path.write_text("")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._count(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self._count(len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", why=_why(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(began=nodeid, at=round(time.time(), 3))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(ended=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            seconds = round(getattr(report, "duration", 0.0), 3)
            why = {} if report.passed else {"why": _why(report)}
            self._write(test=report.nodeid, outcome=report.outcome, seconds=seconds, **why)

    def _count(self, count: int) -> None:
        if count and not self.collected:
            self.collected = count
            self._write(collected=count)

    def _write(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_journal(path: Path) -> dict[str, Any]:
    """Numbers of tests by outcome, those that failed and why, the slowest, what has not been reached, what runs."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    collected = max((entry.get("collected", 0) for entry in entries), default=0)
    tests: dict[str, dict[str, Any]] = {}
    for entry in entries:
        # A test fails once, though its end or the process that ran it may fail too.
        if "test" in entry and tests.get(entry["test"], {}).get("outcome") != "failed":
            tests[entry["test"]] = entry
    by = {outcome: [test for test in tests.values() if test["outcome"] == outcome] for outcome in ("passed", "failed")}
    skipped = [test for test in tests.values() if test["outcome"] == "skipped"]
    slowest = sorted(tests.values(), key=lambda test: -test.get("seconds", 0.0))[:10]
    return {
        "tests": collected,
        "passed": len(by["passed"]),
        "failed": len(by["failed"]),
        "skipped": len(skipped),
        "running": _running(entries),
        "not_reached": max(0, collected - len(tests)),
        "failures": [{"test": test["test"], "why": test["why"]} for test in by["failed"]],
        "why_skipped": sorted({test["why"] for test in skipped}),
        "slowest": {test["test"]: test.get("seconds", 0.0) for test in slowest},
    }


def _running(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tests that have begun and not ended, and when, as `time.time()` has it; a failure is an end."""
    running: dict[str, float] = {}
    for entry in entries:
        if "began" in entry:
            running[entry["began"]] = entry["at"]
        elif "ended" in entry:
            running.pop(entry["ended"], None)
        elif entry.get("outcome") == "failed":
            running.pop(entry["test"], None)
    return running


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The message of the error, or the reason for skipping."""
    found = report.longrepr
    if isinstance(found, tuple):
        return str(found[2])
    crash = getattr(found, "reprcrash", None)
    lines = [line for line in str(found or "").splitlines() if line.strip()]
    text = crash.message if crash is not None else (lines[-1] if lines else "")
    return text[:_LONGEST]
