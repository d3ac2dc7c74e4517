"""A process that gets a time limit, and whatever it has started, of which nothing outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GRACE", "MARK", "End", "ask", "run_until"]

MARK = "TRUSTRATIO_ON_GPU"
"""Variable in the environment of every process of a part, by which they are found whoever their parent is."""

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL, and again for what has been killed to be gone."""

LARGEST_LOG = 4 << 20
"""Bytes of a log above which its middle is left out."""

_POLL = 0.1  # seconds


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        seconds: How long it took.
        status: Its exit status, negative for a signal; None if it is still there, e.g. waiting for a driver.
        stopped: Whether it was still running at its limit.
    """

    seconds: float
    status: int | None
    stopped: bool


def run_until(
    command: Sequence[str],
    log: Path,
    limit: float,
    environment: Mapping[str, str],
    folder: Path,
    meanwhile: Callable[[], None] = lambda: None,
) -> End:
    """Run a command in a session of its own, and end the whole of it after `limit` seconds: SIGTERM, then SIGKILL.

    Args:
        command: Program and arguments.
        log: File that gets what it prints; of more than `LARGEST_LOG` bytes the beginning and the end are kept.
        limit: Seconds; it may take up to twice `GRACE` longer until everything is gone.
        environment: All variables.
        folder: To run in.
        meanwhile: Called every tenth of a second.
    """
    began = time.monotonic()
    token = uuid.uuid4().hex
    log.write_bytes(b"")
    with log.open("ab") as output:  # at the end of the file, wherever that is after the log was cut
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, MARK: f"{environment.get(MARK, '')} {token}"},  # a part may run parts of its own
            cwd=folder,
            start_new_session=True,
        )
    stopped = False
    try:
        while process.poll() is None and not stopped:
            stopped = time.monotonic() - began >= limit
            _cut(log)
            meanwhile()
            _wait(process, 0.0 if stopped else _POLL)
        if stopped:
            _signal_all(process, token, signal.SIGTERM)
            _wait(process, GRACE)
    finally:
        _kill_all(process, token)
        _cut(log)
    return End(time.monotonic() - began, process.poll(), stopped)


def ask(
    command: Sequence[str], limit: float, environment: Mapping[str, str], folder: Path
) -> tuple[int | None, list[str]]:
    """Run a short program; return its exit status, None if it has none in time, and its lines."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        said = Path(scratch) / "said"
        try:
            end = run_until(command, said, limit, environment, folder)
        except OSError as error:
            return None, [str(error)]
        lines = [line.strip() for line in said.read_text(errors="replace").splitlines()]
    return None if end.stopped else end.status, [line for line in lines if line]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _kill_all(process: subprocess.Popen[bytes], token: str) -> None:
    """Kill until nothing is left: what starts others may have done so meanwhile."""
    ends = time.monotonic() + GRACE
    while _signal_all(process, token, signal.SIGKILL) and time.monotonic() < ends:
        _wait(process, _POLL)
        time.sleep(_POLL / 10)


def _signal_all(process: subprocess.Popen[bytes], token: str, number: signal.Signals) -> bool:
    """Send a signal to the process, its group, and all that carry the mark; return whether there was any."""
    there = process.poll() is None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
    for pid in _marked(token):
        there = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return there


def _marked(token: str) -> Iterator[int]:
    """Processes with the mark, also those that have made a session of their own; none where there is no /proc."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = entry.read_bytes().split(b"\0")
            if any(one.startswith(MARK.encode()) and token.encode() in one for one in variables):
                yield int(entry.parent.name)


def _cut(log: Path) -> None:
    """Leave out the middle of a log that is too large, so that a part which prints without end fills no disk."""
    if log.stat().st_size <= LARGEST_LOG:
        return
    kept = LARGEST_LOG // 4
    with log.open("r+b") as file:
        head = file.read(kept)
        file.seek(-kept, os.SEEK_END)
        tail = file.read(kept)
        file.seek(0)
        file.write(head + b"\n[...]\n" + tail)
        file.truncate()
