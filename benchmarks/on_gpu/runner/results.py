"""What a run leaves: a log and a JSON file of each part, a summary of a line each, and both in one archive."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .processes import End

__all__ = ["RECORDED", "Results", "judge", "last_line", "read_json"]

Found = dict[str, Any]

RECORDED = "; recorded so far: "
"""What follows it in a verdict, the end of a log too, is for the summary alone."""
ARCHIVE = "results.tar.gz"
MOST_BYTES = 24 << 20
"""Of the files that an archive takes, before they are packed."""

_LONGEST_VERDICT = 400
_SECONDS_BETWEEN_ARCHIVES = 10.0


class Results:
    """The files of a run. A disk that is full costs what would have been written, and not the parts to come.

    Args:
        folder: Where they are.
        bring: Another folder that gets the summary and an archive of everything, where few files are brought back.
    """

    def __init__(self, folder: Path, bring: Path | None = None):
        self.folder, self.bring = folder, bring
        for made in (folder, bring):
            if made is not None:
                made.mkdir(parents=True, exist_ok=True)
        self.packed = 0.0

    def say(self, line: str) -> None:
        """Print a line and add it to the summary."""
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(line, flush=True)
        for folder in filter(None, (self.folder, self.bring)):
            with contextlib.suppress(OSError), (folder / "summary.txt").open("a") as file:
                file.write(f"{line}\n")

    def forget(self, name: str) -> None:
        """Remove what an earlier run of a part has left."""
        for path in (*self.folder.glob(f"{name}.*"), *self.folder.glob(f"{name}-*")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def finish(self, name: str, facts: Found) -> None:
        """Add facts about the run of a part to its numbers, whatever they are."""
        path = self.folder / f"{name}.json"
        unfinished = path.with_suffix(".json.new")
        with contextlib.suppress(OSError):
            unfinished.write_text(json.dumps({**read_json(path), "run": facts}, indent=1) + "\n")
            os.replace(unfinished, path)

    def pack(self, *, now: bool = False) -> None:
        """Bring the archive up to date, every ten seconds if not `now`."""
        if self.bring is None or not (now or time.monotonic() - self.packed > _SECONDS_BETWEEN_ARCHIVES):
            return
        self.packed = time.monotonic()
        unfinished = self.bring / f".{ARCHIVE}.new"
        with contextlib.suppress(OSError):
            with tarfile.open(unfinished, "w:gz", compresslevel=3) as archive:
                for name, content in self._contents():
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mtime = len(content), int(time.time())
                    archive.addfile(entry, io.BytesIO(content))
            os.replace(unfinished, self.bring / ARCHIVE)

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        """Files by name, numbers and logs before others, small ones first, as long as there is room."""
        room = MOST_BYTES
        for path in sorted(self.folder.rglob("*"), key=_worth):
            content = _content(path, room)
            if content is not None:
                room -= len(content)
                yield path.relative_to(self.folder).as_posix(), content


def _worth(path: Path) -> tuple[bool, int]:
    return path.suffix not in (".json", ".txt", ".log"), _size(path) or 0


def _size(path: Path) -> int | None:
    """Of a file; None if it is none, or whoever made it has taken it away."""
    try:
        return path.stat().st_size if path.is_file() and not path.is_symlink() else None
    except OSError:
        return None


def _content(path: Path, most: int) -> bytes | None:
    """Of a file of at most so many bytes."""
    size = _size(path)
    if size is None or size > most:
        return None
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return None


def read_json(path: Path) -> Found:
    """What a file has, nothing if it is missing or broken."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, of what a carriage return would have left to be seen."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 16)))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def judge(end: End, found: Found, log: Path, limit: float) -> tuple[str, str]:
    """Return "passed", "failed", "stopped" or "killed", and the verdict or why there is none."""
    verdict = found.get("verdict")
    if end.stopped or end.status is None:
        outcome, why = (
            "stopped",
            f"at its limit of {limit:.0f} s{'' if end.status is not None else ', and is still there'}",
        )
    elif end.status < 0:
        outcome, why = "killed", f"by {_name(-end.status)}{', out of memory?' if -end.status == signal.SIGKILL else ''}"
    elif verdict is not None:
        return ("failed" if end.status else "passed"), _short(verdict)
    else:
        outcome, why = "failed", f"without a verdict, exit status {end.status}"
    recorded = ", ".join(name for name in found if name not in ("run", "verdict")) or "nothing"
    line = last_line(log) or "none"
    return outcome, _short(
        f"{why}{f'; {verdict}' if verdict else ''}{RECORDED}{_short(recorded, 160)}; last line: {line}"
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _short(text: object, most: int = _LONGEST_VERDICT) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
