"""A report as one self-contained HTML page."""

from __future__ import annotations

import math
from html import escape

from .verdict import AuditedLayer, Report

__all__ = ["page_of"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #dde1e8 }
th:first-child, td:first-child { text-align: left }
.verdict { padding: .8rem 1rem; border-radius: .4rem; font-weight: 600 }
.exact { background: #dff3e4 } .wrong { background: #fbdcdc } .refused { background: #e7e9ee }
tr.wrong td { background: #fdeeee } tr.idle td { color: #7a8292 }
"""
HEADS = ("layer", "shape", "moved", "error", "bound", "‖w‖", "alone", "‖Δw‖", "alone")


def page_of(report: Report) -> str:
    """The page."""
    title = f"{report.optimizer}: {report.configuration}, {report.ranks} ranks"
    notes = [*report.notes, *(f"{found.kind}: {found.text}" for found in report.findings)]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>',
            f"<body><h1>{escape(title)}</h1>",
            f'<p class="verdict {report.verdict}">{escape(report.sentence)}</p>',
            f"<ul>{listed}</ul>" if listed else "",
            *_numbers(report),
            *_table(report),
            f"<p>{escape(', '.join(f'{package} {version}' for package, version in report.versions.items()))}</p>",
            "</body></html>",
        ]
    )


def _numbers(report: Report) -> list[str]:
    if not report.layers:
        return []
    return [
        f"<p>Collectives in optimizer.step: {report.collectives} per step. Optimizer state: "
        f"{report.state_bytes_per_parameter:.3g} bytes per parameter over all ranks, "
        f"{report.state_bytes_per_parameter_alone:.3g} in one process.</p>",
        "<p><b>moved</b>: how far the layer moved, over how far one process moves it; <b>error</b>: of the weights at "
        "the end, over the length of the layer's path; <b>bound</b>: what rounding explains.</p>",
    ]


def _table(report: Report) -> list[str]:
    if not report.layers:
        return []
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    return [f"<table><thead><tr>{head}</tr></thead><tbody>", *map(_row, report.layers), "</tbody></table>"]


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
    cells = [escape(layer.name), shape, *(f"{number:.4g}" if not math.isnan(number) else "NaN" for number in numbers)]
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
