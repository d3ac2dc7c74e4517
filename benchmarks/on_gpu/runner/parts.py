"""Runs parts one after another, each in processes of its own and with a limit: none takes anything from the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .processes import GRACE, run_until
from .results import Results, judge, read_json
from .shares import SHARES, Share, limit_of

__all__ = ["Runner"]

PACKING = 1.0  # seconds


@dataclass
class Runner:
    """What all parts have in common.

    Attributes:
        results: Where they leave what they find.
        command: Makes a part's command of its name and limit.
        environment: Of the processes.
        folder: To run in.
        ends: When everything has to be over, by `time.monotonic()`.
        shares: Of the time.
        facts: Stored with the numbers of every part.
        begun: Names of the parts that there was time for.
    """

    results: Results
    command: Callable[[str, float], Sequence[str]]
    environment: Mapping[str, str]
    folder: Path
    ends: float
    shares: Mapping[str, Share] = field(default_factory=lambda: SHARES)
    facts: Mapping[str, Any] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)

    def run(self, names: Sequence[str]) -> bool:
        """Whether every part passed that there was time for."""
        passed = [self._run_part(names[index:]) for index in range(len(names))]
        return all(passed)

    def _run_part(self, names: Sequence[str]) -> bool:
        """The first of those that are still to run."""
        name = names[0]
        # What is stopped at its limit takes longer to be gone, and then everything is packed.
        left = self.ends - time.monotonic() - 2 * GRACE - PACKING
        limit = limit_of(names, left, self.shares)
        if limit is None:
            self._say(name, 0.0, f"no time left: needs {self.shares[name].least:.0f} s, {max(left, 0.0):.0f} were left")
            return True
        self.begun.append(name)
        began = time.monotonic()
        try:
            outcome, verdict = self._end_of(name, limit)
        except KeyboardInterrupt:
            seconds = time.monotonic() - began
            self._finish(name, "interrupted", f"after {seconds:.0f} s", seconds, limit)
            raise
        self._finish(name, outcome, verdict, time.monotonic() - began, limit)
        return outcome == "passed"

    def _end_of(self, name: str, limit: float) -> tuple[str, str]:
        """Run a part; return its outcome and verdict."""
        log = self.results.folder / f"{name}.log"
        try:
            self.results.forget(name)
            self._finish(name, "running", "its end is not known", 0.0, limit)
            end = run_until(self.command(name, limit), log, limit, self.environment, self.folder, self.results.pack)
            return judge(end, read_json(log.with_suffix(".json")), log, limit)
        except OSError as error:  # no memory for a process, no disk for its log
            return "failed", f"could not be run: {error}"

    def _finish(self, name: str, outcome: str, verdict: str, seconds: float, limit: float) -> None:
        """Write down how a part ended, or that it has begun: of a run that is killed that is all there is."""
        facts = {"outcome": outcome, "verdict": verdict, "seconds": round(seconds, 1), "limit": round(limit, 1)}
        self.results.finish(name, {**self.facts, **facts})
        if outcome != "running":
            self._say(name, seconds, f"{outcome}: {verdict}" if outcome != "passed" else verdict)

    def _say(self, name: str, seconds: float, text: str) -> None:
        self.results.say(f"{name}: {seconds:.1f} s: {text}")
        self.results.pack(now=True)
