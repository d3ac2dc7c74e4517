"""A report in plain text, for terminals and for the message of an AssertionError."""

from __future__ import annotations

import math

from .verdict import AuditedLayer, Report

__all__ = ["described"]

MOST_LAYERS = 60


def described(report: Report) -> str:
    """The table of layers, what the checks found, and the verdict, which comes last."""
    lines = [f"{report.optimizer}, {report.configuration}, {report.ranks} ranks"]
    lines += [f"  note: {note}" for note in report.notes]
    if report.layers:
        lines += ["", *_table(report), "", *_numbers(report)]
    lines += [f"  {'WRONG' if found.is_wrong else 'note'}: {found.kind}: {found.text}" for found in report.findings]
    lines += ["", report.sentence if report.layers else f"Could not be run: {report.sentence}"]
    return "\n".join(lines)


def _table(report: Report) -> list[str]:
    layers = list(report.layers)
    if len(layers) > MOST_LAYERS:  # the wrong ones first, since nobody reads thousands
        layers = sorted(layers, key=lambda one: one.is_exact)[:MOST_LAYERS]
    width = max(len("layer"), *(len(layer.name) for layer in layers))
    head = f"  {'layer':<{width}}  {'moved':>9}  {'error':>9}  {'|w|':>9}  {'alone':>9}  {'|dw|':>9}  {'alone':>9}"
    rest = len(report.layers) - len(layers)
    more = [f"  and {rest} more"] if rest else []
    return [head, *(f"  {layer.name:<{width}}  {_row(layer)}" for layer in layers), *more]


def _row(layer: AuditedLayer) -> str:
    norms = (layer.weight_norm, layer.weight_norm_alone, layer.change, layer.change_alone)
    numbers = "  ".join(f"{number:>9.4g}" for number in norms)
    mark = "" if layer.has_gradient and layer.is_exact else "  no gradient" if not layer.has_gradient else "  WRONG"
    moved = "-" if math.isnan(layer.moved) and not layer.change_alone else f"{layer.moved:.5g}"
    error = "-" if math.isnan(layer.error) and not layer.change_alone else f"{layer.error:.2g}"
    return f"{moved:>9}  {error:>9}  {numbers}{mark}"


def _numbers(report: Report) -> list[str]:
    return [
        f"  collectives in optimizer.step: {report.collectives} per step",
        f"  state: {report.state_bytes_per_parameter:.3g} bytes per parameter over all ranks, "
        f"{report.state_bytes_per_parameter_alone:.3g} in one process",
    ]
