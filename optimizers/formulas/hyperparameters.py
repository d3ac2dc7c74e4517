"""Checks of hyper-parameters, with messages that name the argument, its value and its range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def check_range(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number in the interval from `low` to `high`.

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
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}") from None
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def check_betas(betas: Any, name: str = "betas") -> None:
    """Raise ValueError unless `betas` are two numbers in [0, 1)."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"{name} must be two numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        check_range(f"{name}[{index}]", beta, 0.0, 1.0, high_open=True)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not any(value is choice or value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


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
