"""Which of the numbers of a measured step are shown where they are shown one by one, and their names there."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from .records import LayerNorm, MeasuredNorms

__all__ = ["NUMBERS", "SHOWN", "Scalars"]

NUMBERS = tuple(field.name for field in fields(LayerNorm))
"""Names of the numbers that are measured, as in `LayerNorm`."""

SHOWN = ("ratio", "weight", "gradient", "update")
"""Those that are shown of each layer unless others are asked for."""


class Scalars:
    """The whole model's numbers, `layer_norms/model/NUMBER`, and chosen ones of layers, `layer_norms/NUMBER/LAYER`.

    Args:
        layers: Patterns of layers' names as in a shell, one or several: ``"*"`` all, ``"encoder.*.weight"``,
            ``()`` none.
        numbers: Which numbers of each of these layers; of `NUMBERS`.

    Raises:
        ValueError: If a number has no such name.
        TypeError: If a pattern or a number's name is no text.
    """

    def __init__(self, layers: str | Iterable[str] = "*", numbers: Iterable[str] = SHOWN):
        self._patterns = _texts(layers, 'layers takes names or patterns such as "encoder.*"')
        self._numbers = _texts(numbers, 'numbers takes names such as "ratio"')
        for number in self._numbers:
            if number not in NUMBERS:
                raise ValueError(f"numbers has {number!r}; there are: {', '.join(NUMBERS)}")
        self._matching: dict[str, bool] = {}

    def of(self, measured: MeasuredNorms) -> dict[str, float]:
        """Return the numbers by their names."""
        found = {}
        if measured.model is not None:
            found = {f"layer_norms/model/{number}": getattr(measured.model, number) for number in NUMBERS}
        self._look_at(list(measured))
        for layer, norms in measured.items():
            if self._matching[layer]:
                found |= {f"layer_norms/{number}/{layer}": getattr(norms, number) for number in self._numbers}
        return found

    def _look_at(self, layers: Sequence[str]) -> None:
        """Match layers that were not seen so far, and warn of patterns that have no layer."""
        if all(layer in self._matching for layer in layers):
            return
        for layer in layers:
            self._matching[layer] = any(fnmatch.fnmatchcase(layer, pattern) for pattern in self._patterns)
        for pattern in self._patterns:
            if not fnmatch.filter(self._matching, pattern):
                some = ", ".join(list(self._matching)[:3])
                warnings.warn(f"no layer has a name like {pattern!r}; there are {some}, ...", stacklevel=2)


def _texts(given: Any, allowed: str) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    texts = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{allowed}, one or several, and was given {text!r}")
    return texts
