"""The report of a file of measured steps: one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..pages.template import filled_page, json_number, levels
from .file import replace_text
from .history import NormsHistory, load_history
from .scalars import NUMBERS

__all__ = ["write_report"]

_PAGE = Path(__file__).with_name("report_page.html")

_MEASURES = {
    "ratio": "‖Δw‖ / ‖w‖",
    "gradient": "‖g‖",
    "weight": "‖w‖",
    "update": "‖Δw‖",
    "largest_gradient": "largest |g|",
    "largest_weight": "largest |w|",
    "largest_update": "largest |Δw|",
    "zero_gradients": "share of g that is zero",
    "zero_weights": "share of w that is zero",
    "zero_updates": "share of w that does not move",
}
"""What the map of layers shows, the first at first."""

_LINEAR = {"zero_gradients", "zero_weights", "zero_updates"}
_MOST_POINTS = 1000
_MOST_COLUMNS, _FEWEST_COLUMNS, _MOST_CELLS = 500, 50, 1_500_000
_MOST_NAMES = 12


def write_report(file: Path, output: Path | None = None) -> Path:
    """Write the report of a file that `LayerNorms.write_to` wrote, finished or not; return the page's path.

    Args:
        file: The measured steps. Lines that cannot be read are left out, and the page says so.
        output: The page; ``FILE.html`` in the place of the file's own ending by default.

    Raises:
        ValueError: If there is no measured step in the file, or the output is the file itself.
        OSError: If one cannot be read or the other not be written.
    """
    output = output or file.with_suffix(".html")
    if output.absolute() == file.absolute():
        raise ValueError(f"the page would be written over {str(file)!r}: choose another file with --output")
    history = load_history(file)
    replace_text(output, [filled_page(_PAGE, _page_data(history, file.name))])
    return output


def _page_data(history: NormsHistory, name: str) -> dict[str, Any]:
    shown = "" if len(history.steps) == history.measured else f", of which {len(history.steps):,} are drawn"
    return {
        "title": f"Layer norms: {name}",
        "subtitle": f"{_count(history.measured, 'measured step')} up to step {history.steps[-1]:,}{shown}; "
        f"{_count(len(history.layers), 'layer')}",
        "notices": list(_notices(history)),
        "model": _model_series(history),
        "map": _map(history),
        "numbers": list(NUMBERS),
        "layers": [[layer, *map(_shown, norms.values())] for layer, norms in history.last.items()],
        "last": history.steps[-1],
    }


def _notices(history: NormsHistory) -> Iterator[str]:
    """Yield what a reader must know first."""
    if history.not_finite:
        first = min(history.not_finite.values())
        named = [f"{layer} (step {step:,})" for layer, step in history.not_finite.items()]
        yield f"Not finite from step {first:,} on: {_some(named)}."
    if history.still:
        yield f"Not moved in any measured step, though there was a gradient: {_some(history.still)}."
    if history.without_gradient:
        yield f"Without a gradient in any measured step: {_some(history.without_gradient)}."
    if history.clipped:
        yield f"The gradient was clipped in {history.clipped:,} of {_count(history.measured, 'measured step')}."
    if history.unread:
        lines = f"line {history.unread[0]:,}" + (", the first of them" if len(history.unread) > 1 else "")
        yield f"{_count(len(history.unread), 'line')} of the file could not be read and is left out: {lines}."


def _model_series(history: NormsHistory) -> dict[str, list[Any]]:
    bins = _bins(len(history.steps), _MOST_POINTS)
    found: dict[str, list[Any]] = {"step": [history.steps[one.stop - 1] for one in bins]}
    for number, values in history.model.items():
        reduced = _reduced(torch.tensor([values], device="cpu"), bins)
        found[number] = [json_number(value) for value in reduced[0].tolist()]
    found["clipped"] = [any(history.was_clipped[one]) for one in bins]
    return found


def _map(history: NormsHistory) -> dict[str, Any] | None:
    cells = max(1, len(history.layers) * len(_MEASURES))
    bins = _bins(len(history.steps), min(_MOST_COLUMNS, max(_FEWEST_COLUMNS, _MOST_CELLS // cells)))
    measures = []
    for number, title in _MEASURES.items():
        scale = levels(_reduced(history.table(number), bins), linear=number in _LINEAR)
        if scale is not None:
            measures.append({"title": title, "linear": number in _LINEAR, **scale})
    if not measures:
        return None
    steps = [history.steps[one.stop - 1] for one in bins]
    return {"layers": history.layers, "names": history.layers, "steps": steps, "measures": measures}


def _bins(count: int, most: int) -> list[slice]:
    """Cut `count` steps into at most `most` runs of nearly equal length."""
    pieces = min(count, most)
    return [slice(count * i // pieces, count * (i + 1) // pieces) for i in range(pieces)]


def _reduced(table: torch.Tensor, bins: Sequence[slice]) -> torch.Tensor:
    """The medians of a table's runs of columns, of what is finite in them."""
    if len(bins) == table.shape[1]:
        return table
    finite = torch.where(table.isfinite(), table, math.nan)
    return torch.stack([finite[:, one].nanmedian(dim=1).values for one in bins], dim=1)


def _shown(value: float) -> float | str | None:
    """A number of the table; what is not finite is a text there."""
    return json_number(value) if math.isfinite(value) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")
