"""A report as one self-contained HTML page."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from ..pages.template import with_shared_parts
from .verdict import AuditedLayer, Report

__all__ = ["page_of"]

_PAGE = Path(__file__).with_name("report_page.html")
HEADS = ("layer", "shape", "moved", "error", "bound", "‖w‖", "alone", "‖Δw‖", "alone")
MEANINGS = (
    "<b>moved</b>: how far the layer moved, over how far one process moves it, 1 is right; <b>error</b>: of the "
    "weights at the end, over the length of the layer's path; <b>bound</b>: what rounding explains; <b>alone</b>: the "
    "number to its left in one process. Grey layers get no gradient."
)


def page_of(report: Report) -> str:
    """The page."""
    title = f"{report.optimizer}: {report.configuration}, {report.ranks} rank{'s' * (report.ranks > 1)}"
    page = with_shared_parts(_PAGE).replace("/*TITLE*/", escape(title))
    return page.replace("/*BODY*/", "\n".join(_body(report)))


def _body(report: Report) -> list[str]:
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    notes = [*report.notes, *(f"{found.kind}: {found.text}" for found in report.findings)]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return [
        f"<h1>{escape(report.optimizer)}</h1>",
        f'<p class="sub">{escape(report.configuration)}, ranks: {report.ranks}</p>',
        f'<p class="notice {report.verdict}">{escape(report.sentence)}</p>',
        f"<h2>What else was found</h2><ul>{listed}</ul>" if notes else "",
        *(_layers(report) if report.layers else ()),
        f"<footer>{escape(versions)}</footer>",
    ]


def _layers(report: Report) -> list[str]:
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    return [
        '<h2>Layers</h2><div class="card wide">',
        f"<table><thead><tr>{head}</tr></thead><tbody>",
        *map(_row, report.layers),
        "</tbody></table></div>",
        f'<p class="sub">{MEANINGS}</p>',
        f"<p>Collectives in optimizer.step: {report.collectives} per step. Optimizer state: "
        f"{report.state_bytes_per_parameter:.3g} bytes per parameter over all ranks, "
        f"{report.state_bytes_per_parameter_alone:.3g} in one process.</p>",
    ]


def _row(layer: AuditedLayer) -> str:
    kind = "idle" if not layer.has_gradient else "" if layer.is_exact else "wrong"
    numbers = (
        layer.moved,
        layer.error,
        layer.bound,
        layer.weight_norm,
        layer.weight_norm_alone,
        layer.change,
        layer.change_alone,
    )
    shape = "×".join(map(str, layer.shape)) or "1"
    cells = [escape(layer.name), shape, *map(_number, numbers)]
    if math.isnan(layer.moved) and not layer.change_alone:
        cells[2] = "–"
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _number(number: float) -> str:
    return "NaN" if math.isnan(number) else f"{number:.4g}"
