"""The runs of a comparison: their commands, how they are carried out, and what came out."""

from __future__ import annotations

import math
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from ..common.errors import INTERRUPTED, RecipeError
from ..common.script import command_file
from ..configuration.config import RecipeConfig
from ..runs.checkpoints import find_checkpoint
from ..runs.folder import METRICS
from ..runs.metrics import read_metrics


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
        accuracy=math.nan if diverged else validation[-1].get("validation_accuracy", math.nan),
        steps=train[-1]["step"],
        sequences=train[-1].get("sequences", 0),
        sequences_per_second=mean(r["sequences_per_second"] for r in train if "sequences_per_second" in r),
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
    of_run = ["--optimizer", run.optimizer, "--lr", repr(run.lr), "--seed", str(run.seed), *second_rate(config, run.lr)]
    try:
        find_checkpoint(folder)
    except RecipeError:
        where = ["--output", str(folder), "--overwrite"]
    else:
        where = ["--resume", str(folder)]
    # What was passed on may set phase_two.lr, which the scaled one has to follow: of overrides the last one holds.
    return [*launcher, str(command_file("bert.py")), *passed_on, *of_run, *where]


def carry_out(run: Run, folder: Path, line: Sequence[str], last_step: int) -> Outcome:
    """Start or continue a run with the command `line` unless it is finished, and return what it came to.

    Raises:
        RecipeError: it failed for another reason than a loss that was not finite.
        KeyboardInterrupt: it was stopped by a signal; started again, it goes on where it stopped.
    """
    result = outcome(folder, run, last_step)
    if result is not None:
        print(f"{run.name}: kept, {result.status} ({result.loss:.4f} nats)", flush=True)
        return result
    print(f"{run.name}: {shlex.join(line)}", flush=True)
    status, printed = _run(line)
    result = outcome(folder, run, last_step)
    if result is None and status in (-signal.SIGINT, -signal.SIGTERM, INTERRUPTED):
        raise KeyboardInterrupt
    if result is None:
        end = "\n".join(printed.splitlines()[-15:])
        early = "" if status else f" without a validation at its last step, {last_step} (stopped? then start again)"
        raise RecipeError(f"{run.name} ended with exit status {status}{early}; its last lines:\n{end}")
    print(f"{run.name}: {result.status}, {result.loss:.4f} nats", flush=True)
    return result


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
