"""Compare optimizers on the BERT recipe: same seed, same data order, several learning rates each.

    python recipes/compare.py --preset lamb-tiny --optimizers lamb,lans,vrlamb,adamw --lrs 3 --output runs/comparison

Whatever it does not know is passed on to `recipes/bert.py` (`--global_batch 512 --steps 100 model.layers=4`), as which
every run is started, one after the other. Started again, it keeps the runs that are finished and continues the one that
was interrupted. Written are REPORT.csv (a line per run), REPORT.md, REPORT.json (with curves) and REPORT.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from types import FrameType
from typing import Any, NoReturn

from ..common.errors import RecipeError
from ..common.files import write_json
from ..common.script import command_file
from ..configuration.command_line import parse_command_line
from ..configuration.config import RecipeConfig, is_override
from ..configuration.phases import total_steps
from ..configuration.presets import DEFAULT_PRESET
from ..model.build import outline
from ..runs.checkpoints import find_checkpoint
from ..runs.folder import ENVIRONMENT, METRICS
from ..runs.metrics import read_metrics
from .rate_grids import best_rate, edge, grid_around, next_rate

LEAST_RATES = 3

STARTING_RATES = {
    "adamw": 0.002,
    "clars": 0.5,
    "lamb": 0.02,
    "lambc": 0.02,
    "lans": 0.02,
    "lars": 5.0,
    "mclr": 1e-4,
    "novograd": 0.01,
    "sgd": 0.5,
    "sngm": 0.1,
    "tvlars": 5.0,
    "vradam": 0.001,
    "vrlamb": 0.02,
    "vrlars": 5.0,
    "vrsgd": 0.5,
}
"""Middle of the grid that `--lrs COUNT` makes, for models of the tiny presets' size: guesses to start from."""

_INTERRUPTED = 130
_INSTEAD = {
    "--optimizer": "give --optimizers A,B,...",
    "optimizer.name": "give --optimizers A,B,...",
    "--lr": "give --lrs RATE,RATE,...",
    "optimizer.lr": "give --lrs RATE,RATE,...",
    "--seed": "give --seeds SEED ...",
    "training.seed": "give --seeds SEED ...",
    "--resume": "a comparison goes on in the same --output by itself",
    "--overwrite": "choose another --output to begin anew",
    "--dry_run": "start bert.py with it",
    "--list_presets": "start bert.py with it",
}
"""What is not passed on, because runs would not be what their names say, and what to do instead."""


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    optimizer: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.optimizer}-lr{self.lr:g}-seed{self.seed}"


@dataclass
class Outcome:
    """What a finished run came to.

    Attributes:
        status: "finished", or "diverged" if a loss was not finite; a diverged run's loss is not a number.
        loss: Last validation loss, nats.
        accuracy: Share of the masked tokens that were right there.
        sequences: Sequences trained on.
        validation: (step, loss) pairs.
    """

    optimizer: str
    lr: float
    seed: int
    status: str
    loss: float
    accuracy: float
    steps: int
    sequences: int
    sequences_per_second: float
    validation: list[tuple[int, float]] = field(default_factory=list)


# Runs -----------------------------------------------------------------------------------------------------------------


def outcome(folder: Path, run: Run, last_step: int) -> Outcome | None:
    """Read a run; None if it has not come to its end."""
    if not (folder / METRICS).exists():
        return None
    records = read_metrics(folder)
    train = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation"]
    losses = [r["loss"] for r in train] + [r["validation_loss"] for r in validation]
    diverged = any(not math.isfinite(loss) for loss in losses)
    if not diverged and not (train and validation and train[-1]["step"] == validation[-1]["step"] == last_step):
        return None
    return Outcome(
        **asdict(run),
        status="diverged" if diverged else "finished",
        loss=math.nan if diverged else validation[-1]["validation_loss"],
        accuracy=math.nan if diverged else validation[-1]["validation_accuracy"],
        steps=train[-1]["step"],
        sequences=train[-1]["sequences"],
        sequences_per_second=mean(r["sequences_per_second"] for r in train),
        validation=[(r["step"], r["validation_loss"]) for r in validation],
    )


def second_rate(config: RecipeConfig, lr: float) -> list[str]:
    """Return the override that scales the second phase's rate as `lr` scales the first's; [] if it has none."""
    second = config.phase_two
    if not (second.steps and second.reset_schedule):
        return []
    return [f"phase_two.lr={second.lr * (lr / config.optimizer.lr)!r}"]


def command(
    run: Run, folder: Path, passed_on: Sequence[str], launcher: Sequence[str], config: RecipeConfig
) -> list[str]:
    """Return the command that starts a run, or continues it from its newest checkpoint."""
    own = ["--optimizer", run.optimizer, "--lr", repr(run.lr), "--seed", str(run.seed), *second_rate(config, run.lr)]
    try:
        find_checkpoint(folder)
    except RecipeError:
        where = ["--output", str(folder), "--overwrite"]
    else:
        where = ["--resume", str(folder)]
    # What was passed on may set phase_two.lr, which the scaled one has to follow: of overrides the last one holds.
    return [*launcher, str(command_file("bert.py")), *passed_on, *own, *where]


def carry_out(run: Run, folder: Path, line: Sequence[str], last_step: int) -> Outcome:
    """Start or continue a run with the command `line` unless it is finished, and return what it came to.

    Raises:
        RecipeError: it failed for another reason than a loss that was not finite.
        KeyboardInterrupt: it was stopped by a signal; started again, it goes on where it stopped.
    """
    found = outcome(folder, run, last_step)
    if found is not None:
        print(f"{run.name}: kept, {found.status} ({found.loss:.4f} nats)", flush=True)
        return found
    print(f"{run.name}: {shlex.join(line)}", flush=True)
    status, printed = _run(line)
    found = outcome(folder, run, last_step)
    if found is None and status in (-signal.SIGINT, -signal.SIGTERM, _INTERRUPTED):
        raise KeyboardInterrupt
    if found is None:
        end = "\n".join(printed.splitlines()[-15:])
        early = "" if status else f" without a validation at its last step, {last_step} (stopped? then start again)"
        raise RecipeError(f"{run.name} ended with exit status {status}{early}; its last lines:\n{end}")
    print(f"{run.name}: {found.status}, {found.loss:.4f} nats", flush=True)
    return found


def _run(line: Sequence[str]) -> tuple[int, str]:
    """Run a command; return its exit status and what it printed. Interrupted, it lets the command end first."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate()
    except KeyboardInterrupt:
        process.terminate()  # the run writes a checkpoint
        process.communicate()
        raise
    return process.returncode, printed


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# Report ---------------------------------------------------------------------------------------------------------------


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
        found = []
        for optimizer in self.optimizers:
            losses = self.losses(optimizer)
            side, lr = edge(losses), next_rate(losses)
            if side is not None:
                found.append(
                    f"{optimizer}: the best learning rate, {min(losses) if side == 'lowest' else max(losses):g}, is "
                    f"the {side} of its grid: widen the grid (add {lr:g}), its loss is not its best"
                )
        return found


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
    with path.open("w", newline="") as file:
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
    path.with_name(path.name + ".md").write_text(markdown(comparison))
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


# Command line ---------------------------------------------------------------------------------------------------------


def grids(optimizers: Sequence[str], given: Sequence[str], allow_single: bool) -> dict[str, tuple[float, ...]]:
    """Read `--lrs`: a number of rates, rates for all, or NAME=RATE,RATE,... for one.

    Raises:
        RecipeError: not of these forms, fewer than three rates (unless allowed), or no rates for an optimizer.
    """
    found: dict[str, tuple[float, ...]] = {}
    count: int | None = None
    for text in given:
        name, equals, rates = text.rpartition("=")
        if equals and name not in optimizers:
            raise RecipeError(f"--lrs {text}: {name!r} is not among --optimizers {','.join(optimizers)}")
        if not equals and rates.isdigit():
            count = int(rates)
        else:
            grid = _rates(text, rates)
            found.update(dict.fromkeys([name] if equals else optimizers, grid))
    for name in optimizers:
        if name not in found and count is not None and name not in STARTING_RATES:
            raise RecipeError(f"no learning rate is known to start from for {name}: give --lrs {name}=RATE,RATE,RATE")
        if name not in found and count is not None:
            found[name] = grid_around(STARTING_RATES[name], count)
        if not found.get(name):
            raise RecipeError(f"--lrs gives no rate for {name}: add {name}=RATE,RATE,RATE, or a number of rates")
        if len(found[name]) < LEAST_RATES and not allow_single:
            raise RecipeError(
                f"{name} has {len(found[name])} learning rate(s). With fewer than {LEAST_RATES} a comparison compares "
                "the guesses, not the optimizers: give more with --lrs, or insist with --allow_single_lr"
            )
    return {name: found[name] for name in optimizers}


def _rates(text: str, rates: str) -> tuple[float, ...]:
    try:
        grid = tuple(sorted({float(rate) for rate in rates.split(",")}))
    except ValueError:
        raise RecipeError(f"--lrs {text} is no list of numbers; e.g. --lrs 3, or --lrs lamb=0.01,0.02,0.04") from None
    if not all(rate > 0 and math.isfinite(rate) for rate in grid):
        raise RecipeError(f"--lrs {text}: learning rates must be finite and above 0")
    return grid


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; --help lists the options")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; return the options and what is passed on to bert.py."""
    parser = _Parser(
        prog="compare.py",
        description="Compare optimizers on the BERT recipe with several learning rates each. Other options and "
        "overrides are passed on to bert.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default=DEFAULT_PRESET, help="preset of all runs")
    parser.add_argument("--optimizers", required=True, metavar="A,B,...", help="names, separated by commas")
    parser.add_argument(
        "--lrs",
        nargs="+",
        default=[str(LEAST_RATES)],
        metavar="GRID",
        help="how many learning rates, or RATE,RATE,... for all, or NAME=RATE,RATE,... for one optimizer (default: 3)",
    )
    parser.add_argument(
        *("--allow_single_lr", "--allow-single-lr"), action="store_true", help="accept fewer than three learning rates"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds; every one with every learning rate")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of the runs")
    parser.add_argument("--report", type=Path, help="path of the report without suffix (default: OUTPUT/comparison)")
    parser.add_argument("--launcher", default=sys.executable, help='e.g. "deepspeed --num_gpus 8" (default: Python)')
    # `--lrs 3 model.layers=4`: argparse would give a list flag all that follows it.
    options, passed_on = parser.parse_known_args([text for text in arguments if not is_override(text)])
    passed_on += filter(is_override, arguments)
    for text in passed_on:
        key = text.partition("=")[0].strip()  # --lr 0.1, --lr=0.1, optimizer.lr=0.1
        if key in _INSTEAD:
            raise RecipeError(f"{text!r}: compare.py sets {key} itself; {_INSTEAD[key]}")
    return options, ["--preset", options.preset, *passed_on]


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Keep the comparison's settings beside its runs; a folder with other settings is not gone on with.

    Raises:
        RecipeError: the folder holds another comparison.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.json"
    if path.exists() and (saved := json.loads(path.read_text())) != settings:
        raise RecipeError(f"{output} holds a comparison with other settings, {saved}; choose another --output")
    write_json(path, settings)


def compare(arguments: Sequence[str]) -> str:
    """Carry out the comparison and write its report; return the table.

    Raises:
        RecipeError: bad options, or a run that failed.
    """
    options, passed_on = parse(arguments)
    optimizers = [name.strip().lower() for name in options.optimizers.split(",") if name.strip()]
    for name in optimizers:  # every bad option is found before the first run
        invocation = parse_command_line([*passed_on, "--optimizer", name])
        outline(invocation.config)
    rates = grids(optimizers, options.lrs, options.allow_single_lr)
    config = invocation.config
    last_step = min(total_steps(config), invocation.max_steps or total_steps(config))
    claim(options.output, {"preset": options.preset, "passed_on": passed_on})
    runs = [Run(name, lr, seed) for name in optimizers for lr in rates[name] for seed in options.seeds]
    launcher = shlex.split(options.launcher)
    outcomes = []
    for run in runs:
        folder = options.output / run.name
        outcomes.append(carry_out(run, folder, command(run, folder, passed_on, launcher, config), last_step))
    about = {
        "preset": options.preset,
        "passed_on": passed_on[2:],
        "global_batch": config.training.global_batch,
        "steps": last_step,
        **_of_first_run(options.output / runs[0].name),
    }
    write_report(outcomes, about, options.report or options.output / "comparison")
    return markdown(Comparison(outcomes))


def _of_first_run(folder: Path) -> dict[str, Any]:
    entropies = [r["unigram_entropy"] for r in read_metrics(folder) if "unigram_entropy" in r]
    environment = json.loads((folder / ENVIRONMENT).read_text())
    return {"unigram_entropy": entropies[-1] if entropies else None, "environment": environment}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    # SIGTERM ends the comparison as Ctrl-C does: the run in progress must not go on alone.
    previous = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        print(compare(sys.argv[1:] if arguments is None else arguments))
    except RecipeError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    return 0
