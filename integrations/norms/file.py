"""A file of measured steps: one JSON object per line, in the order of the steps, each step once.

JSON has no numbers that are not finite: they are the texts "NaN", "Infinity" and "-Infinity", which Python's `float`
and JavaScript's `Number` both read.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from .records import MeasuredNorms

__all__ = ["NormsFile", "read_lines", "replace_text"]

_LONGEST = 2**28
"""Bytes of a line: 200,000 layers take less. A file without any line ends is not read into memory whole."""

_MOST_STEPS = 2**53

_in_use: WeakValueDictionary[str, NormsFile] = WeakValueDictionary()
"""Files by their paths, each with what writes to it."""


class NormsFile:
    """Takes measured steps, and appends each to the file when it comes.

    A file that is there is continued where `steps_done` says that steps were taken before: lines of later steps, which
    will be taken again, and a line that was cut off are removed. With 0 it begins anew, and the file that was there is
    kept as ``FILE.old``.

    Args:
        path: Its folder is made if need be.
        steps_done: Steps that training has taken before.

    Raises:
        ValueError: If what is there and should be continued holds anything but measured steps, or another of these
            writes to the file.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], steps_done: int = 0):
        self._path = Path(path)
        _refuse_folder(self._path)
        self._claim()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if steps_done and self._path.exists():
            replace_text(self._path, _continued(self._path, steps_done))
        elif self._path.exists() and self._path.stat().st_size:
            self._path.replace(self._path.with_name(f"{self._path.name}.old"))
        self._append("")

    def write(self, measured: MeasuredNorms, step: int) -> None:
        """Append the record of a step.

        Args:
            measured: What was measured.
            step: Its number in the training, which may have begun before the measuring.
        """
        self._append(_line({**measured.record(), "step": step}))

    def _claim(self) -> None:
        """Be the only one that writes to the file, for as long as this object is in use."""
        file = str(self._path.resolve())
        if file in _in_use:
            gc.collect()  # the other may be garbage
        if file in _in_use:
            raise ValueError(
                f"{str(self._path)!r} is already written to by another LayerNorms of this process: give another file, "
                "or call remove() of that one"
            )
        _in_use[file] = self

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield number and record of each line; None for one that is no record, e.g. the last if it was cut off.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
            if line.strip():
                yield number, _record(line)


def replace_text(path: Path, texts: Iterable[str]) -> None:
    """Write a UTF-8 file that is either the old one or the new one at any time.

    Raises:
        OSError: If it cannot be written; the error names the file.
    """
    _refuse_folder(path)
    unfinished = path.with_name(f"{path.name}.new")
    try:
        with unfinished.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(texts)
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder: give the name of a file", str(path))


def _continued(path: Path, steps_done: int) -> Iterator[str]:
    """Yield the lines of a file up to a step."""
    unread = None
    for number, record in read_lines(path):
        if unread is not None:
            raise ValueError(
                f"{str(path)!r} cannot be continued: its line {unread} is no measured step. Give another file, or "
                "remove that line if the rest is wanted"
            )
        if record is None:
            unread = number
        elif record["step"] <= steps_done:
            yield _line(record)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_strict(record), allow_nan=False, separators=(",", ":")) + "\n"


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None if it is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("layers"), dict):
        return False
    step, norms = value.get("step"), (value.get("model") or {}, *value["layers"].values())
    return type(step) is int and 0 <= step < _MOST_STEPS and all(isinstance(one, dict) for one in norms)


def _strict(value: Any) -> Any:
    """Return a value in which numbers that are not finite are texts."""
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
