"""BERT at true batches of 65,536 and 131,072 sequences per update on one GPU: one command per run, a time budget each.

    python recipes/gpu_evidence.py sweep      # first: tiny model, six optimizers, three learning rates each
    python recipes/gpu_evidence.py main       # mini model, 64K, at the rates that the sweep found
    python recipes/gpu_evidence.py scale      # the same at 128K: as many sequences, rates times the square root of 2
    python recipes/gpu_evidence.py depth      # small model, 64K, LAMB and AdamW
    python recipes/gpu_evidence.py systems    # base model, 128 tokens: speed, memory, trust ratios; no claim on loss

Each writes OUTPUT/gpu_NAME.json with machine, versions, commands and results. A run that its budget ended goes on when
the command is given again. `--dry_run` prints what would be run.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..common.called import called, examples
from ..common.command import CommandParser, ends_with_message
from ..common.errors import RecipeError
from ..common.files import read_json, write_json
from ..common.machine import describe_machine
from ..common.script import command_file
from ..configuration.config import ModelConfig
from ..model.optimizer import starting_rates
from ..runs.folder import METRICS
from ..runs.metrics import read_metrics
from .rate_grids import best_rate

_FOUR = ("lamb", "lans", "vrlamb", "adamw")
_64K, _128K = 65_536, 131_072  # sequences per update
_BERT_VOCABULARY = 30_522  # of the published models; the others have the recipe's default
_STOP_SECONDS = 60.0  # for the last checkpoint of a run that its budget ended


@dataclass(frozen=True)
class Evidence:
    """One run of this script.

    Attributes:
        purpose: what it shows.
        optimizers: compared, at the rates of the sweep or (if there is no sweep to take them from) a grid.
        size: of the model, one of `MODEL_SIZES`.
        sequence_length: tokens per sequence.
        batches: pairs of sequences per update and number of updates; one comparison each.
        micro_batch: sequences per forward and backward pass.
        rate_factor: what the sweep's best rates are multiplied by; None: three rates each.
        vocabulary: tokens.
        budget: seconds for all comparisons, reports included.
    """

    purpose: str
    optimizers: tuple[str, ...]
    size: str
    sequence_length: int
    batches: tuple[tuple[int, int], ...]
    micro_batch: int
    rate_factor: float | None
    vocabulary: int = 8192
    budget: float = 540.0

    def recipe_arguments(self, batch: int, steps: int) -> list[str]:
        """Return the arguments of bert.py."""
        model = ModelConfig().of_size(self.size)
        flags = {
            "--global_batch": batch,
            "--micro_batch": self.micro_batch,
            "--steps": steps,
            "--sequence_length": self.sequence_length,
        }
        overrides = {
            "data.vocabulary": self.vocabulary,
            "model.layers": model.layers,
            "model.hidden": model.hidden,
            "model.heads": model.heads,
            "model.intermediate": model.intermediate,
            "training.zero_stage": 0,
            "run.validate_every": max(1, steps // 5),
            "run.checkpoint_every": max(1, steps // 2),
            "run.noise_scale": "null",
        }
        return [
            *(text for flag, value in flags.items() for text in (flag, str(value))),
            *(f"{field}={value}" for field, value in overrides.items()),
        ]


EVIDENCE = {
    "sweep": Evidence(
        purpose="learning rates at 64K",
        optimizers=(*_FOUR, "lars", "sgd"),
        size="tiny",
        sequence_length=32,
        batches=((_64K, 100),),
        micro_batch=8192,
        rate_factor=None,
    ),
    "main": Evidence(
        purpose="optimizers at 64K",
        optimizers=_FOUR,
        size="mini",
        sequence_length=64,
        batches=((_64K, 110),),
        micro_batch=4096,
        rate_factor=1.0,
    ),
    "scale": Evidence(
        purpose="the same at 128K",
        optimizers=_FOUR,
        size="mini",
        sequence_length=64,
        batches=((_128K, 55),),  # as many sequences as in "main"
        micro_batch=4096,
        rate_factor=math.sqrt(2.0),  # of the batches' ratio
        budget=600.0,
    ),
    "depth": Evidence(
        purpose="past the unigram plateau",
        optimizers=("lamb", "adamw"),
        size="small",
        sequence_length=64,
        batches=((_64K, 120),),
        micro_batch=4096,
        rate_factor=1.0,
    ),
    "systems": Evidence(
        purpose="speed and memory",
        optimizers=("lamb",),
        size="base",
        sequence_length=128,
        batches=((_64K, 20), (_128K, 5)),  # enough updates for medians
        micro_batch=256,
        rate_factor=1.0,
        vocabulary=_BERT_VOCABULARY,
        budget=600.0,
    ),
}


def commands(name: str, rates: dict[str, float], work: Path) -> list[list[str]]:
    """Return the commands of a run, each with the folder that it writes to as its last argument."""
    evidence = EVIDENCE[name]
    if evidence.rate_factor is None:
        grid = ["3"]
    else:
        scaled = [f"{optimizer}={rates[optimizer] * evidence.rate_factor:.2g}" for optimizer in evidence.optimizers]
        grid = [*scaled, "--allow_single_lr"]
    start = [sys.executable, str(command_file("compare.py")), "--optimizers", ",".join(evidence.optimizers)]
    return [
        [*start, "--lrs", *grid, *evidence.recipe_arguments(batch, steps), "--output", str(work / f"{name}-{batch}")]
        for batch, steps in evidence.batches
    ]


def sweep_rates(output: Path) -> dict[str, float]:
    """Return the best learning rate per optimizer that the sweep found.

    Raises:
        RecipeError: there was no sweep yet.
    """
    path = output / "gpu_sweep.json"
    if not path.exists():
        raise RecipeError(f"the learning rates come from {path}: run `{called('gpu_evidence')} sweep` first")
    rates: dict[str, float] = {}
    for result in read_json(path, "results")["results"]:
        for optimizer in {run["optimizer"] for run in result["runs"]}:
            runs = [run for run in result["runs"] if run["optimizer"] == optimizer]
            best = best_rate({run["lr"]: math.nan if run["loss"] is None else run["loss"] for run in runs})
            if best is not None:
                rates[optimizer] = best
    return rates


def run_within(line: Sequence[str], seconds: float) -> int:
    """Run a command for at most `seconds`, then ask it to stop as Ctrl-C would; return its exit status."""
    process = subprocess.Popen(line, start_new_session=True, preexec_fn=_listen_to_interrupts)
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _listen_to_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **describe_machine("cuda"),
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def systems_numbers(folder: Path) -> list[dict[str, Any]]:
    """Return throughput, utilisation and memory of every run in a comparison's folder, medians over its updates."""
    runs = []
    for metrics in sorted(folder.glob(f"*/{METRICS}")):
        train = [r for r in read_metrics(metrics.parent) if r["kind"] == "train"]
        values: dict[str, Any] = {"run": metrics.parent.name, "steps": len(train)}
        for name in ("sequences_per_second", "tokens_per_second", "model_flops_per_second", "utilisation"):
            numbers = [r[name] for r in train if r.get(name) is not None]
            values[name] = median(numbers) if numbers else None
        peaks = [r["device_peak_memory_bytes"] for r in train if "device_peak_memory_bytes" in r]
        values["device_peak_memory_bytes"] = max(peaks, default=None)
        runs.append(values)
    return runs


def collect(name: str, output: Path, work: Path, passed_on: Sequence[str]) -> int:
    """Carry out one run within its budget and write its JSON; return the exit status.

    Raises:
        RecipeError: no GPU, or no sweep yet.
    """
    if not torch.cuda.is_available():
        raise RecipeError("no CUDA device was found: these are the runs that need one (--dry_run prints the commands)")
    evidence = EVIDENCE[name]
    rates = {} if evidence.rate_factor is None else sweep_rates(output)
    lines = [[*line, *passed_on] for line in commands(name, rates, work)]
    began = time.monotonic()
    results, status = [], 0
    for line, (batch, _) in zip(lines, evidence.batches, strict=True):
        status = run_within(line, evidence.budget - (time.monotonic() - began))
        folder = work / f"{name}-{batch}"
        report = folder / "comparison.json"
        known = read_json(report, "runs") if report.exists() else {"runs": []}
        results.append({**known, "global_batch": batch, "systems": systems_numbers(folder)})
        if status:
            print(f"ended with exit status {status}; the same command goes on from here", file=sys.stderr)
            break
    output.mkdir(parents=True, exist_ok=True)
    values = {
        "purpose": evidence.purpose,
        "finished": status == 0,
        "machine": machine(),
        "commands": [shlex.join(["python", f"recipes/{Path(line[1]).name}", *line[2:]]) for line in lines],
        "seconds": round(time.monotonic() - began, 1),
        "results": results,
    }
    write_json(output / f"gpu_{name}.json", values)
    return status


@ends_with_message("gpu_evidence")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    prog = called("gpu_evidence")
    parser = CommandParser(
        prog=prog,
        description="BERT at 64K and 128K sequences per update on one GPU. Other options go to compare.py.",
        epilog="\n".join(f"{name}: {evidence.purpose}" for name, evidence in EVIDENCE.items()),
        examples=examples(prog, "sweep", "main --dry_run"),
    )
    parser.add_argument("name", choices=list(EVIDENCE), help="which comparison")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the JSON files")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of the runs")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    options, passed_on = parser.parse_known_args(arguments)
    if options.dry_run:
        for line in commands(options.name, starting_rates(), options.work):
            print(shlex.join([*line, *passed_on]))
        return 0
    return collect(options.name, options.output, options.work, passed_on)
