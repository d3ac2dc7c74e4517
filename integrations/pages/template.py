"""Reports: a page's template with the data, the look and the scripts put into it, so that it needs nothing else."""

from __future__ import annotations

import base64
import json
import math
import sys
from array import array
from pathlib import Path
from typing import Any

import torch

__all__ = ["filled_page", "json_number", "levels", "with_shared_parts"]

_PARTS = {"/*LOOK*/": "look.css", "/*CHARTS*/": "charts.js", "/*LAYERS*/": "layers.js"}
_DATA = "/*PAGE-DATA*/"
_DIGITS = 6
_STEPS_OF_SCALE = 65534


def filled_page(template: Path, data: dict[str, Any]) -> str:
    """Return the text of a page.

    Args:
        template: An HTML file with the places ``/*LOOK*/``, ``/*CHARTS*/`` and ``/*LAYERS*/`` where wanted, and
            ``/*PAGE-DATA*/`` in a script element.
        data: What is JSON, without numbers that are not finite.
    """
    page = with_shared_parts(template)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return page.replace(_DATA, text.replace("<", "\\u003c"))  # nothing in it ends the script element


def with_shared_parts(template: Path) -> str:
    """Return the text of a template with look and scripts in their places; see `filled_page`."""
    page = template.read_text(encoding="utf-8")
    for place, name in _PARTS.items():
        page = page.replace(place, Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip("\n"))
    return page


def json_number(value: float) -> float | None:
    """Return a number as strict JSON has it: no NaN, and no more digits than a picture shows."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.{_DIGITS}g}")


def levels(table: torch.Tensor, linear: bool = False) -> dict[str, Any] | None:
    """Return a table of numbers as 16 bits each, for `layerMap` in layers.js.

    Args:
        table: Shape (layers, steps); what is not finite counts as missing, and so does what is not above 0 on a
            logarithmic scale.
        linear: Whether the scale is linear.

    Returns:
        `low` and `high`, the ends of the scale, and `data`, level by level: 1 at `low`, 65,535 at `high`, 0 for a
        missing number. None if all are missing.
    """
    table = table.to(torch.float64)
    valid = table.isfinite() if linear else table.isfinite() & (table > 0)
    if not valid.any():
        return None
    low, high = table[valid].min().item(), table[valid].max().item()
    if linear:
        share = (table - low) / ((high - low) or 1.0)
    else:
        share = torch.log(table / low) / (math.log(high / low) or 1.0)
    found = torch.where(valid, 1 + (_STEPS_OF_SCALE * share).round(), 0.0).to(torch.int64)
    numbers = array("H", found.flatten().tolist())
    if sys.byteorder == "big":
        numbers.byteswap()
    return {"low": low, "high": high, "data": base64.b64encode(numbers.tobytes()).decode("ascii")}
