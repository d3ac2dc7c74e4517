"""Compare optimizers on the BERT recipe: same seed, same data order, several learning rates each.

    python recipes/compare.py --preset lamb-tiny --optimizers lamb,lans,vrlamb,adamw --lrs 3 --output runs/comparison

Whatever it does not know is passed on to `recipes/bert.py` (`--global_batch 512 --steps 100 model.layers=4`), as which
every run is started, one after the other. Started again, it keeps the runs that are finished and continues the one that
was interrupted. Written are REPORT.csv (a line per run), REPORT.md, REPORT.json (with curves) and REPORT.png.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..common.called import called, examples
from ..common.command import MOST_SEED, CommandParser, ends_with_message, within
from ..common.errors import INTERRUPTED, RecipeError
from ..common.files import read_json, require_place_for, require_writable, write_sealed
from ..configuration.batch_growth import most_updates
from ..configuration.command_line import parse_command_line
from ..configuration.overrides import is_override
from ..configuration.presets import DEFAULT_PRESET
from ..model.build import outline
from ..model.optimizer import starting_rates
from ..runs.folder import ENVIRONMENT
from ..runs.metrics import read_metrics
from .rate_grids import LEAST_RATES, grid_around
from .report import Comparison, markdown, write_report
from .runs import Run, carry_out, command

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


def grids(optimizers: Sequence[str], texts: Sequence[str], allow_single: bool) -> dict[str, tuple[float, ...]]:
    """Read `--lrs`: a number of rates, rates for all, or NAME=RATE,RATE,... for one.

    Raises:
        RecipeError: not of these forms, fewer than three rates (unless allowed), or no rates for an optimizer.
    """
    grid_of: dict[str, tuple[float, ...]] = {}
    count: int | None = None
    for text in texts:
        name, equals, rates = text.rpartition("=")
        if equals and name not in optimizers:
            raise RecipeError(f"--lrs {text}: {name!r} is not among --optimizers {','.join(optimizers)}")
        if not equals and rates.isdigit():
            count = int(rates)
        else:
            grid = _rates(text, rates)
            grid_of.update(dict.fromkeys([name] if equals else optimizers, grid))
    for name in optimizers:
        if name not in grid_of and count is not None:
            grid_of[name] = grid_around(starting_rates()[name], count)
        if not grid_of.get(name):
            raise RecipeError(f"--lrs gives no rate for {name}: add {name}=RATE,RATE,RATE, or a number of rates")
        if len(grid_of[name]) < LEAST_RATES and not allow_single:
            raise RecipeError(
                f"{name} has {len(grid_of[name])} learning rate(s). With fewer than {LEAST_RATES} a comparison "
                "compares the guesses, not the optimizers: give more with --lrs, or insist with --allow_single_lr"
            )
    return {name: grid_of[name] for name in optimizers}


def _rates(text: str, rates: str) -> tuple[float, ...]:
    try:
        grid = tuple(sorted({float(rate) for rate in rates.split(",")}))
    except ValueError:
        raise RecipeError(f"--lrs {text} is no list of numbers; e.g. --lrs 3, or --lrs lamb=0.01,0.02,0.04") from None
    if not all(rate > 0 and math.isfinite(rate) for rate in grid):
        raise RecipeError(f"--lrs {text}: learning rates must be finite and above 0")
    return grid


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; return the options and what is passed on to bert.py."""
    prog = called("compare")
    parser = CommandParser(
        prog=prog,
        description="Compare optimizers on the BERT recipe with several learning rates each. Other options and "
        "overrides are passed on to bert.py.",
        examples=examples(
            prog,
            "--optimizers lamb,lans,adamw --lrs 3 --output runs/comparison",
            "--optimizers lamb,adamw --lrs lamb=0.01,0.02,0.04 adamw=0.001,0.002,0.004",
        ),
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
        "--allow_single_lr",
        action="store_true",
        help="accept fewer than three learning rates",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds; every one with every learning rate")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of the runs")
    parser.add_argument("--report", type=Path, help="path of the report without suffix (default: OUTPUT/comparison)")
    parser.add_argument("--launcher", default=sys.executable, help='e.g. "deepspeed --num_gpus 8" (default: Python)')
    # `--lrs 3 model.layers=4`: argparse would give a list flag all that follows it.
    options, passed_on = parser.parse_known_args([text for text in arguments if not is_override(text)])
    passed_on += filter(is_override, arguments)
    for seed in options.seeds:
        within("--seeds", seed, 0, MOST_SEED)
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
    if path.exists() and (saved := read_json(path)) != settings:
        raise RecipeError(f"{output} holds a comparison with other settings, {saved}; choose another --output")
    write_sealed(path, settings)


def compare(arguments: Sequence[str]) -> str:
    """Carry out the comparison and write its report; return the table.

    Raises:
        RecipeError: bad options, or a run that failed.
    """
    options, passed_on = parse(arguments)
    require_writable(options.output)
    require_place_for(Path(f"{options.report or options.output / 'comparison'}.json"))
    names = [name.strip().lower() for name in options.optimizers.split(",")]
    optimizers = list(dict.fromkeys(name for name in names if name))
    if not optimizers:
        raise RecipeError(f"--optimizers {options.optimizers!r} names none: give --optimizers A,B,...")
    for name in optimizers:  # every bad option is found before the first run
        invocation = parse_command_line([*passed_on, "--optimizer", name])
        outline(invocation.config)
    rates = grids(optimizers, options.lrs, options.allow_single_lr)
    config = invocation.config
    if config.run.batch_from_noise:
        raise RecipeError(
            "run.batch_from_noise=true gives each optimizer batches and updates of its own, and a comparison goes by "
            "updates: leave it out, or start the runs with bert.py"
        )
    last_step = min(most_updates(config), invocation.max_steps or most_updates(config))
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
    environment = read_json(folder / ENVIRONMENT)
    return {"unigram_entropy": entropies[-1] if entropies else None, "environment": environment}


@ends_with_message("compare")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    # SIGTERM ends the comparison as Ctrl-C does: the run in progress must not go on alone.
    previous = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        print(compare(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
