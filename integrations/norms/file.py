"""A file of measured steps: one JSON object per line, in the order of the steps, each step once.

JSON has no numbers that are not finite: they are the texts "NaN", "Infinity" and "-Infinity", which Python's `float`
and JavaScript's `Number` both read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .records import MeasuredNorms

__all__ = ["NormsFile", "read_lines"]


class NormsFile:
    """Takes measured steps, and has each on the disk when `write` returns.

    A file that is there is continued where `steps_done` says that steps were taken before: lines of later steps, which
    will be taken again, and a line that was cut off are removed. With 0 it begins anew, and the file that was there is
    kept as ``FILE.old``.

    Args:
        path: Its folder is made if need be.
        steps_done: Steps that training has taken before.

    Raises:
        ValueError: If what is there and should be continued holds anything but measured steps.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], steps_done: int = 0):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if steps_done and self._path.exists():
            _cut(self._path, steps_done)
        elif self._path.exists() and self._path.stat().st_size:
            self._path.replace(self._path.with_name(f"{self._path.name}.old"))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, measured: MeasuredNorms, step: int) -> None:
        """Append the record of a step.

        Args:
            measured: What was measured.
            step: Its number in the training, which may have begun before the measuring.
        """
        record = {**measured.record(), "step": step}
        self._file.write(json.dumps(_strict(record), allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file as they are read; a last line that was cut off is left out.

    Raises:
        ValueError: If a line is no record of a measured step; names it.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = _record(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n") and line.strip():
                raise ValueError(f"{str(path)!r} is no file of layer norms: line {number} is {_shown(line)}")


def _cut(path: Path, steps_done: int) -> None:
    """Leave the steps up to `steps_done` in a file; it is the old one or the new one at any time."""
    shortened = path.with_name(f"{path.name}.new")
    with shortened.open("w", encoding="utf-8") as file:
        for record in read_lines(path):
            if record["step"] <= steps_done:
                file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
    shortened.replace(path)


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None if it is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("layers"), dict) or type(value.get("step")) is not int:
        return False
    return all(isinstance(norms, dict) for norms in (value.get("model") or {}, *value["layers"].values()))


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _strict(value: Any) -> Any:
    """Return a value in which numbers that are not finite are texts."""
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
