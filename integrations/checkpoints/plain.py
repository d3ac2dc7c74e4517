"""Plain values as JSON and back: tensors as numbers, tuples as lists, dicts with the keys that they had.

JSON knows text as keys alone. A scheduler's milestones, which have step numbers, would come back as text that no step
number equals; so a dict that has other keys is written as a list of pairs.
"""

from __future__ import annotations

import json
from typing import Any

import torch

__all__ = ["as_json", "from_json"]

PAIRS = "trustratio: key and value"
"""The only key of a dict that stands for one whose keys are not all text."""


def as_json(value: Any) -> str:
    """Write plain values; tensors as numbers and tuples as lists.

    Raises:
        TypeError: If a value is none of these.
        ValueError: If a value contains itself.
    """
    return json.dumps(_with_pairs(value, ()), default=_numbers)


def from_json(text: str) -> Any:
    """Return what `as_json` was given."""
    return json.loads(text, object_hook=_without_pairs)


def _with_pairs(value: Any, outer: tuple[int, ...]) -> Any:
    """The value, in which each dict whose keys are not all text is a list of pairs."""
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) in outer:
        raise ValueError("it contains itself")
    outer = (*outer, id(value))
    if not isinstance(value, dict):
        return [_with_pairs(inner, outer) for inner in value]
    pairs = [(key, _with_pairs(inner, outer)) for key, inner in value.items()]
    for key, _ in pairs:
        if not isinstance(key, str | int | float | None):
            raise TypeError(f"a dict has the key {key!r}, which is neither text nor a number")
    texts = all(isinstance(key, str) for key, _ in pairs) and PAIRS not in value
    return dict(pairs) if texts else {PAIRS: pairs}


def _without_pairs(entries: dict[str, Any]) -> dict[Any, Any]:
    return dict(entries[PAIRS]) if entries.keys() == {PAIRS} else entries


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is neither a number, a string, a list, a dict nor a tensor")
