"""Programs that a part starts beside itself and that may hang: they end at a limit, with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["NOT_FINISHED", "Child", "python"]

NOT_FINISHED = "not finished"
"""What an outcome begins with that only tells of a limit."""

GONE_SECONDS = 1.0
"""That a killed program is waited for."""


@dataclass
class Child:
    """A program that runs.

    It stays in the process group of its part, so that whoever kills that one kills it too.

    Attributes:
        process: The program.
        limit: Seconds that it may take.
        log: Where its output goes.
    """

    process: subprocess.Popen[bytes]
    limit: float
    log: Path
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Start a program with its output in `log` and `environment` beside this process's own."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return cls(process, limit, log)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def outcome(self) -> str | None:
        """None while it runs, "" if it has ended well, or what went wrong; past its limit it is ended here."""
        status = self.process.poll()
        if status is None and self.seconds < self.limit:
            return None
        if status is None:
            self.end()
            return f"{NOT_FINISHED} after {self.limit:.0f} s"
        return f"{_ending(status)}: {self.last_line()}" if status else ""

    def wait(self) -> str:
        """The outcome, once it is there."""
        while (outcome := self.outcome()) is None:
            time.sleep(0.05)
        return outcome

    def last_line(self) -> str:
        """Of what it has written; of a traceback, the error."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it wrote nothing")

    def end(self) -> None:
        """Kill it and all that it has started: compilers, launchers' ranks."""
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            family = []
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        # One that waits for a driver is not gone, whatever it is sent: the part goes on without it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GONE_SECONDS)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
