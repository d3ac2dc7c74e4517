"""metrics.jsonl: one JSON object per line, written while a run goes on and read afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.files import parse_json, whole_file
from .folder import METRICS

NAMES = "names"
"""Kind of the lines that name the layers of the lines after them."""


class MetricsLog:
    """Appends records to metrics.jsonl, flushed line by line; a log that is not `active` writes nothing."""

    def __init__(self, folder: Path, active: bool) -> None:
        """Open the log of a run folder; one that goes on keeps the names that it has."""
        self._file = (folder / METRICS).open("a", encoding="utf-8", buffering=1) if active else None
        if self._file is not None and _ends_in_half_a_line(folder / METRICS):
            self._file.write("\n")  # of a run that was killed
        self._names: dict[str, list[str]] = {}
        for line in metric_lines(folder) if active else ():
            if line["kind"] == NAMES:
                self._names = {key: value for key, value in line.items() if isinstance(value, list)}

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; layers' names are written once, not with every record's numbers by layer."""
        if self._file is None:
            return
        names = {key: list(value) for key, value in record.items() if isinstance(value, dict)}
        if any(self._names.get(key) != value for key, value in names.items()):
            self._names.update(names)
            self._line({"kind": NAMES, "step": record["step"], **self._names})
        values = {key: [_rounded(v) for v in record[key].values()] for key in names}
        self._line({**record, **values})

    def _line(self, values: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(values, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def metric_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl as they were written, names apart from numbers."""
    with (folder / METRICS).open("rb") as file:
        for line in file:
            if (values := _values(line)) is not None:
                yield values


def _values(line: bytes) -> dict[str, Any] | None:
    """Return a line's values; None of half a line, which a run that was killed may have left."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and _is_line(values) else None


def drop_records_after(folder: Path, step: int) -> None:
    """Remove what metrics.jsonl has after update `step`, which a continued run computes again, and what is no line.

    The file then goes on as if nobody had disturbed the run.
    """
    if not (folder / METRICS).exists():
        return
    with (folder / METRICS).open("rb") as old, whole_file(folder / METRICS, "wb") as new:
        for line in old:
            values = _values(line)
            if values is not None and values["step"] <= step and line.endswith(b"\n"):
                new.write(line)


_NEEDED = {"train": "loss", "validation": "validation_loss"}  # what the lines of a kind are read for


def _is_line(values: dict[str, Any]) -> bool:
    """Tell whether an object has the form of a line: what a broken disk left of one may be anything."""
    kind, step = values.get("kind"), values.get("step")
    if not isinstance(kind, str) or not isinstance(step, int):
        return False
    lists = [value for value in values.values() if isinstance(value, list)]
    if kind == NAMES:
        return all(isinstance(name, str) for names in lists for name in names)
    plain = all(isinstance(value, int | float | str | list | None) for value in values.values())
    numbers = all(isinstance(value, int | float) for of_layers in lists for value in of_layers)
    return plain and numbers and isinstance(values.get(_NEEDED.get(kind, "step")), int | float)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records in step order; where a resumed run repeated a step, its own record is the one returned."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    names: dict[str, list[str]] = {}
    for line in metric_lines(folder):
        if line["kind"] == NAMES:
            names = line
            continue
        if any(len(line[key]) != len(names.get(key, ())) for key in _lists(line)):
            continue  # the names before it are lost
        by_layer = {key: dict(zip(names[key], line[key], strict=True)) for key in _lists(line)}
        records[line["kind"], line["step"]] = {**line, **by_layer}
    return sorted(records.values(), key=lambda record: (record["step"], record["kind"]))


def _ends_in_half_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def _lists(line: dict[str, Any]) -> list[str]:
    return [key for key, value in line.items() if isinstance(value, list)]


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")  # more digits are noise, and most of the file
