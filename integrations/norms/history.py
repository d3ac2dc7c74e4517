"""A file of measured steps read into tables whose size does not grow with the file: what the report is drawn from."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .file import read_lines
from .scalars import NUMBERS

__all__ = ["NormsHistory", "load_history"]

MOST_STEPS = 4096
"""Of longer files every second step is kept, every fourth, and so on."""

NEEDED = ("update", "gradient")


@dataclass
class NormsHistory:
    """What a file says.

    Attributes:
        layers: Names, in the order in which they appear.
        steps: The measured steps that are kept, ascending.
        measured: How many steps were measured altogether.
        clipped: How many of these were clipped.
        not_finite: By name the first step in which a layer's norms were not finite; in the order of the steps.
        still: Layers that had a gradient and were never moved.
        without_gradient: Layers that never had a gradient, and were never moved.
        unread: Numbers of the lines that are no measured steps.
        last: The numbers of the last step, by layer.
    """

    layers: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    measured: int = 0
    clipped: int = 0
    not_finite: dict[str, int] = field(default_factory=dict)
    still: list[str] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    last: dict[str, dict[str, float]] = field(default_factory=dict)
    model: dict[str, list[float]] = field(default_factory=dict)
    was_clipped: list[bool] = field(default_factory=list)
    rows: list[array[float]] = field(default_factory=list)

    def table(self, number: str) -> torch.Tensor:
        """One number of all layers in the steps that are kept: fp32, shape (layers, steps); NaN where there is none."""
        table = torch.full((len(self.steps), len(self.layers)), math.nan, device="cpu")
        for row, values in zip(table, self.rows, strict=True):
            of_number = torch.tensor(values[NUMBERS.index(number) :: len(NUMBERS)], device="cpu")
            row[: len(of_number)] = of_number
        return table.T


def load_history(path: Path) -> NormsHistory:
    """Read a file, and leave out what cannot be read.

    Raises:
        ValueError: If there is no measured step in it.
        OSError: If it cannot be read.
    """
    reading = _Reading()
    for number, record in read_lines(path):
        if record is None:
            reading.history.unread.append(number)
        else:
            reading.add(record)
    history = reading.done()
    if not history.measured:
        what = "no line of it is a measured step" if history.unread else "it is empty"
        raise ValueError(f"{str(path)!r} is no file of layer norms: {what}. LayerNorms.write_to(file=...) writes one")
    return history


class _Reading:
    """Takes records one after the other."""

    def __init__(self) -> None:
        self.history = NormsHistory(model={number: [] for number in NUMBERS})
        self._index: dict[str, int] = {}
        self._moved: set[str] = set()
        self._had_gradient: set[str] = set()
        self._every = 1

    def add(self, record: dict[str, Any]) -> None:
        """Take one; of a step that comes again, or is before the last, what came before is forgotten."""
        history, step = self.history, record["step"]
        layers = {name: _numbers(norms) for name, norms in record["layers"].items()}
        while history.steps and history.steps[-1] >= step:
            self._forget_last()
        for name, norms in layers.items():
            self._look_at(name, norms, step)
        history.last = layers
        history.clipped += record.get("clipped") is True
        if history.measured % self._every == 0:
            self._keep(step, layers, record)
        history.measured += 1
        if len(history.steps) > MOST_STEPS:
            self._thin()

    def done(self) -> NormsHistory:
        history = self.history
        resting = [name for name in history.layers if name not in self._moved and name not in history.not_finite]
        history.still = [name for name in resting if name in self._had_gradient]
        history.without_gradient = [name for name in resting if name not in self._had_gradient]
        return history

    def _look_at(self, name: str, norms: dict[str, float], step: int) -> None:
        if name not in self._index:
            self._index[name] = len(self._index)
            self.history.layers.append(name)
        if not all(math.isfinite(norms[number]) for number in NEEDED):
            self.history.not_finite.setdefault(name, step)
        if norms["update"] > 0:
            self._moved.add(name)
        if norms["gradient"] > 0:
            self._had_gradient.add(name)

    def _keep(self, step: int, layers: dict[str, dict[str, float]], record: dict[str, Any]) -> None:
        history = self.history
        row = array("f", [math.nan]) * (len(self._index) * len(NUMBERS))
        for name, norms in layers.items():
            start = self._index[name] * len(NUMBERS)
            row[start : start + len(NUMBERS)] = array("f", [norms[number] for number in NUMBERS])
        model = _numbers(record.get("model") or {})
        history.steps.append(step)
        history.rows.append(row)
        history.was_clipped.append(record.get("clipped") is True)
        for number in NUMBERS:
            history.model[number].append(model[number])

    def _lists(self) -> tuple[list[Any], ...]:
        history = self.history
        return history.steps, history.rows, history.was_clipped, *history.model.values()

    def _forget_last(self) -> None:
        self.history.measured -= 1
        self.history.clipped -= self.history.was_clipped[-1]
        for values in self._lists():
            values.pop()

    def _thin(self) -> None:
        self._every *= 2
        for values in self._lists():
            del values[1::2]


def _numbers(norms: dict[str, Any]) -> dict[str, float]:
    return {number: _number(norms.get(number)) for number in NUMBERS}


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        return math.nan
