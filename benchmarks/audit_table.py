"""Audits the optimizers that people use, under the shardings that people use.

    python -m benchmarks.audit_table                     # everything: a quarter of an hour on two cores
    python -m benchmarks.audit_table --only timm          # rows whose name has this in it; the others keep their cells
    python -m benchmarks.audit_table --page               # picture and table again, from the numbers there are

Writes docs/results/audit.json and audit.png, and the table in docs/audit.md. Needs DeepSpeed, matplotlib, no GPU, and

    pip install --no-deps timm==1.0.31 pytorch_optimizer==4.1.0 bitsandbytes==0.50.2

Rows of a package that is not installed keep the cells that they had.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.contenders import timm_optimizer
from benchmarks.machine import describe_machine
from trustratio.integrations.audits.configurations import Configuration
from trustratio.integrations.audits.errors import CannotAudit
from trustratio.integrations.audits.examination import examine, versions
from trustratio.integrations.audits.models import Matrices
from trustratio.integrations.audits.ranks import Ranks
from trustratio.integrations.audits.reading import configuration_of
from trustratio.integrations.audits.subject import Subject
from trustratio.integrations.audits.verdict import REFUSED, WRONG, Report
from trustratio.optimizers import OPTIMIZERS

RANKS = 2
OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "results"
PAGE = OUTPUT.parent / "audit.md"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
PACKAGES = ("torch", "deepspeed", "timm", "pytorch_optimizer", "bitsandbytes", "trustratio")
NEEDED = ("deepspeed", "matplotlib")
COMPARED = {"timm": "1.0.31", "pytorch_optimizer": "4.1.0", "bitsandbytes": "0.50.2"}
"""Packages whose optimizers are audited, with the versions of the stored table."""
SECONDS = 300.0

SHARDINGS: dict[str, Any] = {
    "DDP": "ddp",
    "FSDP2": {"fsdp": 2},
    **{f"ZeRO-{stage}": {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0} for stage in (1, 2, 3)},
}


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        name: As people know it.
        optimizer: As the audit wants it.
        options: Others than its defaults.
        model: None: the audit's own.
    """

    name: str
    optimizer: Any
    options: dict[str, Any] = field(default_factory=dict)
    model: Any = None

    @property
    def package(self) -> str | None:
        """The package in `COMPARED` that it is from."""
        first = self.name.split()[0]
        return first if first in COMPARED else None


def from_timm(file: str, name: str, parameters: Any, **options: Any) -> Any:
    """An optimizer of timm, whose package needs a torchvision that fits torch."""
    return timm_optimizer(file, name)(parameters, **options)


def timm_lamb(parameters: Any, **options: Any) -> Any:
    """Timm's Lamb."""
    return from_timm("lamb", "Lamb", parameters, **options)


def timm_lars(parameters: Any, **options: Any) -> Any:
    """Timm's Lars."""
    return from_timm("lars", "Lars", parameters, **options)


def timm_novograd(parameters: Any, **options: Any) -> Any:
    """Timm's NvNovoGrad."""
    return from_timm("nvnovograd", "NvNovoGrad", parameters, **options)


def pytorch_optimizer_muon(parameters: Any, **options: Any) -> Any:
    """pytorch_optimizer's Muon: matrices by Muon, the rest by its AdamW; it asks for two groups."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "use_muon": True},
        {"params": [p for p in parameters if p.dim() <= 1], "use_muon": False},
    ]
    return importlib.import_module("pytorch_optimizer").Muon(groups, **options)


DECAY = {"weight_decay": 0.01}
ROWS = [
    Row("torch AdamW", "torch.optim.AdamW", {"lr": 0.01, **DECAY}),
    Row("torch SGD", "torch.optim.SGD", {"lr": 0.1, "momentum": 0.9, **DECAY}),
    Row("torch Adafactor", "torch.optim.Adafactor", {"lr": 0.01, **DECAY}),
    Row("torch Muon, on matrices", "torch.optim.Muon", {"lr": 0.01, **DECAY}, Matrices),
    Row("timm Lamb", timm_lamb, {"lr": 0.05, **DECAY}),
    Row("timm Lars", timm_lars, {"lr": 0.5, "momentum": 0.9, **DECAY}),
    Row("timm NvNovoGrad", timm_novograd, {"lr": 0.01, **DECAY}),
    Row("pytorch_optimizer Lamb", "pytorch_optimizer.Lamb", {"lr": 0.05, **DECAY}),
    Row("pytorch_optimizer LARS", "pytorch_optimizer.LARS", {"lr": 0.5, **DECAY}),
    Row("pytorch_optimizer Muon", pytorch_optimizer_muon, {"lr": 0.01, **DECAY}),
    Row("pytorch_optimizer AdaBelief", "pytorch_optimizer.AdaBelief", {"lr": 0.01, **DECAY}),
    Row("bitsandbytes LAMB", "bitsandbytes.optim.LAMB", {"lr": 0.05, **DECAY}),
    Row("bitsandbytes AdamW", "bitsandbytes.optim.AdamW", {"lr": 0.01, **DECAY}),
    Row("DeepSpeed CPUAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam", {"lr": 0.01, **DECAY}),
    Row("DeepSpeed FusedAdam", "deepspeed.ops.adam.FusedAdam", {"lr": 0.01, **DECAY}),
    Row("DeepSpeed FusedLamb", "deepspeed.ops.lamb.FusedLamb", {"lr": 0.05, **DECAY}),
    *(
        Row(
            f"trustratio {entry.optimizer_class.__name__}",
            name,
            # At lower rates rounding hides it; AdaShift begins after as many steps as it keeps gradients.
            {"lr": max(1e-3, entry.starting_rate), **({"keep": 2} if name == "adashift" else {})},
        )
        for name, entry in OPTIMIZERS.items()
    ),
]


# Numbers ------------------------------------------------------------------------------------------------------------


def audit_cell(row: Row, configuration: Configuration, ranks: Ranks) -> dict[str, Any]:
    """One optimizer under one sharding, as plain numbers."""
    try:
        report = examine(Subject(row.optimizer, row.model, row.options), configuration, ranks)
    except CannotAudit as error:
        return {"verdict": REFUSED, "sentence": str(error)}
    return {
        "verdict": report.verdict,
        "sentence": report.sentence,
        "findings": [{"kind": found.kind, "is_wrong": found.is_wrong, "text": found.text} for found in report.findings],
        "factor": _factor(report),
        "error": _largest([layer.error for layer in report.layers if layer.has_gradient]),
        "wrong_layers": sum(not layer.is_exact for layer in report.layers),
        "layers": len(report.layers),
        "worst": None if report.worst is None else report.worst.name,
        "collectives": report.collectives,
        "state_bytes_per_parameter": report.state_bytes_per_parameter,
    }


def _factor(report: Report) -> float | str | None:
    """By how much the layer that is farthest off moved too far or too little; "NaN", or "stuck" if one did not move."""
    wrong = [layer for layer in report.layers if not layer.is_exact]
    if any(not math.isfinite(layer.weight_norm) for layer in wrong):
        return "NaN"
    if any(layer.change == 0 for layer in wrong):
        return "stuck"
    factor = max((layer.factor for layer in wrong), default=None)
    return "∞" if factor == math.inf else factor


def _largest(errors: list[float]) -> float | str | None:
    if any(math.isnan(error) for error in errors):
        return "NaN"
    return max(errors, default=None)


def rows_to_measure(only: str | None) -> list[Row]:
    """Return the rows whose name has `only` in it, without those whose package is missing, which is said."""
    rows = [row for row in ROWS if only is None or only in row.name]
    if not rows:
        raise SystemExit(f"no row has {only!r} in its name: there are {', '.join(row.name for row in ROWS)}")
    missing = {row.package for row in rows if row.package is not None and not _is_installed(row.package)}
    for package in sorted(filter(None, missing)):
        install = f"pip install --no-deps {package}=={COMPARED[package]}"
        print(f"{package} is not installed, so its rows keep the cells that they had: {install}")
    return [row for row in rows if row.package not in missing]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def measure(rows: list[Row], result: dict[str, Any]) -> None:
    """Audit the rows, each under every sharding, and put their cells into the result."""
    configurations = {name: configuration_of(given) for name, given in SHARDINGS.items()}
    with contextlib.closing(Ranks(RANKS, timeout=SECONDS)) as ranks:
        for row in rows:
            cells = {}
            for name, configuration in configurations.items():
                cells[name] = audit_cell(row, configuration, ranks)
                print(f"{row.name:<30} {name:<8} {cell_text(cells[name])}", flush=True)
            result["rows"][row.name] = {"options": row.options, "cells": cells}


# The table and the picture --------------------------------------------------------------------------------------------


def cell_text(cell: dict[str, Any]) -> str:
    """What stands in the table: "exact", "refuses" and its like, or how wrong it is."""
    if cell["verdict"] == REFUSED:
        sentence = cell["sentence"]
        is_here = not any(text in sentence for text in ("could not be made", "cannot be imported"))
        return "crashes" if " died " in sentence else "refuses" if is_here else "not here"
    if cell["verdict"] != WRONG:
        return "exact"
    factor = cell["factor"]
    if isinstance(factor, str):
        return factor
    if factor is not None and factor >= 1.1:
        return f"{factor:.3g}×" if factor < 100 else f"{factor:,.0f}×"
    if cell["wrong_layers"]:
        return f"{100 * cell['error']:.2g} %" if cell["error"] >= 1e-4 else f"{cell['error']:.0e}"
    return next(found["kind"] for found in cell["findings"] if found["is_wrong"])


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| optimizer | {' | '.join(SHARDINGS)} |", "|---" * (len(SHARDINGS) + 1) + "|"]
    for name, row in result["rows"].items():
        cells = [row["cells"][sharding] for sharding in SHARDINGS]
        texts = (f"**{cell_text(cell)}**" if cell["verdict"] == WRONG else cell_text(cell) for cell in cells)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


COLORS = {"exact": "#bfe5c7", WRONG: "#f2a3a0", REFUSED: "#dcdfe5"}
ROUNDED = "#f7dfa5"
OURS = "trustratio "


def draw(result: dict[str, Any], path: Path) -> None:
    """A grid of cells: green exact, red wrong, yellow off by less than a tenth, grey refused."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = _drawn_rows(result)
    figure, axes = plt.subplots(figsize=(8, 0.29 * len(rows) + 0.9), dpi=150)
    for y, cells in enumerate(rows.values()):
        for x, sharding in enumerate(SHARDINGS):
            cell = cells[sharding]
            axes.add_patch(plt.Rectangle((x, y), 0.97, 0.92, color=_color(cell), linewidth=0))
            weight = "bold" if cell["verdict"] == WRONG else "normal"
            axes.text(x + 0.485, y + 0.48, cell_text(cell), ha="center", va="center", fontsize=9, fontweight=weight)
    axes.set(xlim=(0, len(SHARDINGS)), ylim=(len(rows), 0), yticks=[y + 0.46 for y in range(len(rows))])
    axes.set_yticklabels(list(rows), fontsize=9)
    axes.set_xticks([x + 0.485 for x in range(len(SHARDINGS))], list(SHARDINGS), fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.suptitle("Five steps on two ranks, beside one process: how far the worst layer is off", fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _drawn_rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows' cells; this package's optimizers in one row where they are all the same."""
    rows = {name: row["cells"] for name, row in result["rows"].items()}
    ours = [name for name in rows if name.startswith(OURS)]
    texts = {tuple(cell_text(rows[name][sharding]) for sharding in SHARDINGS) for name in ours}
    if len(texts) != 1:
        return rows
    kept = {name: cells for name, cells in rows.items() if name not in ours}
    return {**kept, f"all {len(ours)} of trustratio": rows[ours[0]]}


def _color(cell: dict[str, Any]) -> str:
    is_small = cell["verdict"] == WRONG and isinstance(cell["factor"], float) and cell["error"] < 0.1
    return ROUNDED if is_small else COLORS[cell["verdict"]]


def write_page(result: dict[str, Any]) -> None:
    """Picture, and the table between its marks in the page."""
    draw(result, OUTPUT / "audit.png")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_table", description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="rows whose name has this in it; the others keep their cells")
    parser.add_argument("--page", action="store_true", help="no audits: picture and table again")
    given = parser.parse_args(arguments)
    missing = [package for package in NEEDED if not _is_installed(package)]
    if missing:
        parser.error(f"this needs {', '.join(missing)}: pip install -c constraints.txt {' '.join(missing)}")
    path = OUTPUT / "audit.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    # Of a package that is not installed, the version is that of the cells that are kept.
    of_packages = {**old.get("versions", {}), **versions(PACKAGES)}
    result = {"ranks": RANKS, "machine": describe_machine("cpu"), "versions": of_packages, "rows": old["rows"]}
    rows = [] if given.page else rows_to_measure(given.only)
    if not rows:
        result = old
    else:
        measure(rows, result)
        result["rows"] = {row.name: result["rows"][row.name] for row in ROWS if row.name in result["rows"]}
        path.write_text(json.dumps(result, indent=1) + "\n")
    write_page(result)


if __name__ == "__main__":
    main()
