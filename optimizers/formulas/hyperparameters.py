"""Checks of hyper-parameters, with messages that name the argument, its value and its range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

LARGEST = torch.finfo(torch.float32).max


def check_range(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number in the interval from `low` to `high`, and one that fp32 can hold.

    Args:
        name: The argument's name.
        value: What was given; a one-element tensor counts as a number.
        low: Lower end; an infinite end is excluded.
        high: Upper end.
        low_open: Whether the lower end itself is excluded.
        high_open: Whether the upper end itself is excluded.
    """
    low_open, high_open = low_open or low == -math.inf, high_open or high == math.inf
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    if not is_number(value):
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}{_hint(value)}")
    number = float(value)
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}, got {value!r}")
    if abs(number) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:.1e}, the largest number of fp32, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a value is one real number: of Python, numpy or a tensor, but no text, truth value or list."""
    if isinstance(value, bool | str | bytes | bytearray | complex):
        return False
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.is_floating_point() and not value.is_meta
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not getattr(value, "ndim", 0)


def _hint(value: Any) -> str:
    if isinstance(value, str):
        try:
            return f", which is text: write {float(value)!r}, without quotation marks (YAML reads 6e-3 as text)"
        except ValueError:
            return ", which is text"
    if isinstance(value, list | tuple) and len(value) == 1 and is_number(value[0]):
        return f": write {value[0]!r}, without brackets"
    return ""


def check_betas(betas: Any, name: str = "betas") -> None:
    """Raise ValueError unless `betas` are two numbers in [0, 1)."""
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"{name} must be two numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        check_range(f"{name}[{index}]", beta, 0.0, 1.0, high_open=True)


def check_bounds(name: str, bounds: Any) -> None:
    """Raise ValueError unless `bounds` are (low, high) with 0 ≤ low ≤ high; high may be infinite."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"{name} must be (low, high), got {bounds!r}")
    low, high = bounds
    check_range(f"{name}[0]", low, 0.0)
    if not (is_number(high) and low <= high):
        raise ValueError(f"{name}[1] must be in [{low:g}, inf], got {high!r}")
    if float(high) != math.inf:
        check_range(f"{name}[1]", high, low)


def check_update_clip(value: Any) -> None:
    """Raise ValueError unless the option `update_clip` is a number above 0, or None for no clip."""
    if value is not None:
        check_range("update_clip", value, 0.0, low_open=True)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`; 1 is not True."""
    if not any(value is choice or (_same_kind(value, choice) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _same_kind(value: Any, choice: Any) -> bool:
    return isinstance(value, type(choice)) and isinstance(value, bool) == isinstance(choice, bool)


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_segments(segments: Any, names: Sequence[str] | None) -> None:
    """Raise ValueError unless `segments` is a count, or counts by a pattern for names of the group's parameters.

    Args:
        segments: A group's option; None for one segment each.
        names: The names of the group's parameters, None if they have none.
    """
    if segments is None:
        return
    counts = segments if isinstance(segments, Mapping) else {"*": segments}
    for pattern, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                "segments must be a number of equal parts along dimension 0, at least 1, or a dict of such numbers by "
                f"parameter name or pattern, got {segments!r}"
            )
        if names is not None and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"segments has the name {pattern!r}, which no parameter of the group has: {names!r}")
