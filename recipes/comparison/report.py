"""What a comparison writes: a table, a line per run, and curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..common.files import whole_file, write_json, write_text
from .rate_grids import best_rate, edge, next_rate
from .runs import Outcome


class Comparison:
    """The outcomes, summed up by optimizer."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        """Compare `outcomes`, in their order."""
        self.outcomes = list(outcomes)
        self.optimizers = list(dict.fromkeys(o.optimizer for o in outcomes))

    def of(self, optimizer: str, lr: float | None = None) -> list[Outcome]:
        """Return an optimizer's outcomes, of one learning rate or of all."""
        return [o for o in self.outcomes if o.optimizer == optimizer and lr in (None, o.lr)]

    def losses(self, optimizer: str) -> dict[float, float]:
        """Return the mean loss of the seeds by learning rate; not a number if one of them diverged."""
        rates = sorted({o.lr for o in self.of(optimizer)})
        return {lr: mean(o.loss for o in self.of(optimizer, lr)) for lr in rates}

    def best(self, optimizer: str) -> list[Outcome]:
        """Return the outcomes at the best learning rate; [] if all diverged."""
        rate = best_rate(self.losses(optimizer))
        return [] if rate is None else self.of(optimizer, rate)

    def warnings(self) -> list[str]:
        """Name the grids that ended at their best rate, and say what to add."""
        warnings = []
        for optimizer in self.optimizers:
            losses = self.losses(optimizer)
            side, lr = edge(losses), next_rate(losses)
            if side is not None:
                warnings.append(
                    f"{optimizer}: the best learning rate, {min(losses) if side == 'lowest' else max(losses):g}, is "
                    f"the {side} of its grid: widen the grid (add {lr:g}), its loss is not its best"
                )
        return warnings


def markdown(comparison: Comparison) -> str:
    """Return the table, best optimizer first, and the warnings."""
    order = sorted(comparison.optimizers, key=lambda name: _order(comparison.best(name)))
    lines = [
        "| optimizer | best lr | validation loss, nats | masked accuracy | all learning rates: loss |",
        "|---|---|---|---|---|",
    ]
    for name in order:
        grid = ", ".join(f"{lr:g}: {_number(loss)}" for lr, loss in comparison.losses(name).items())
        best = comparison.best(name)
        if not best:
            lines.append(f"| {name} | none | diverged | | {grid} |")
            continue
        values = [o.loss for o in best]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        mark = " (edge of its grid)" if edge(comparison.losses(name)) else ""
        accuracy = mean(o.accuracy for o in best)
        lines.append(f"| {name} | {best[0].lr:g}{mark} | {mean(values):.3f}{spread} | {accuracy:.1%} | {grid} |")
    return "\n".join(lines + [f"\nWarning: {text}." for text in comparison.warnings()]) + "\n"


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a line per run."""
    rows = [{name: value for name, value in asdict(o).items() if name != "validation"} for o in outcomes]
    with whole_file(path) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(comparison: Comparison, unigram_entropy: float | None, path: Path) -> None:
    """Draw each optimizer's best curve, and loss against learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for index, name in enumerate(comparison.optimizers):
        colour = f"C{index}"
        for number, o in enumerate(comparison.best(name)):
            steps, losses = zip(*o.validation, strict=True)
            label = f"{name}, lr {o.lr:g}" if number == 0 else None
            left.plot(steps, losses, color=colour, lw=1.5, alpha=1.0 if number == 0 else 0.5, label=label)
        grid = [(lr, loss) for lr, loss in comparison.losses(name).items() if math.isfinite(loss)]
        right.plot(
            [lr for lr, _ in grid], [loss for _, loss in grid], color=colour, marker="o", ms=5, lw=1.2, label=name
        )
        for lr, loss in comparison.losses(name).items():
            if not math.isfinite(loss):
                right.axvline(lr, color=colour, lw=0.8, ls=":")
    if unigram_entropy is not None:
        for axes in (left, right):
            axes.axhline(unigram_entropy, color="#6b7280", ls="--", lw=1.0, label=f"unigram {unigram_entropy:.2f}")
    left.set_xlabel("step")
    left.set_ylabel("validation loss, nats")
    left.set_title("best learning rate of each", fontsize=10)
    right.set_xlabel("learning rate (dotted: diverged)")
    right.set_xscale("log")
    right.set_title("end of the run", fontsize=10)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_report(outcomes: Sequence[Outcome], about: dict[str, Any], path: Path) -> None:
    """Write the table, the figure and the numbers; `path` has no suffix."""
    comparison = Comparison(outcomes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(outcomes, path.with_name(path.name + ".csv"))
    write_text(path.with_name(path.name + ".md"), markdown(comparison))
    runs = [{name: _or_none(value) for name, value in asdict(o).items()} for o in outcomes]
    write_json(path.with_name(path.name + ".json"), {**about, "runs": runs})
    draw(comparison, about.get("unigram_entropy"), path.with_name(path.name + ".png"))


def _or_none(value: Any) -> Any:
    """Return a value as strict JSON has it, which knows no NaN."""
    if isinstance(value, list | tuple):
        return [_or_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _order(best: Sequence[Outcome]) -> float:
    return mean(o.loss for o in best) if best else math.inf


def _number(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"
