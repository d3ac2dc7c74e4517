"""Markdown of what the parts found; without torch, since the page is written where there may be none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

__all__ = ["NOT_MEASURED", "Found", "gib", "middle", "table"]

Found = Mapping[str, Any]
"""What a part's NAME.json holds; {} if there is none."""

NOT_MEASURED = "not measured"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the values that are there; None if none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None
