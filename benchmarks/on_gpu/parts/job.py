"""The recipe itself: tiny BERT with LAMB, bf16, ZeRO-1, on one device."""

from __future__ import annotations

import importlib.util
import shlex
import tempfile
from pathlib import Path
from subprocess import Popen

from ..job.page import is_good, tables, verdict
from ..job.process import numbers_of, recipe_process, wait
from ..job.promise import promised_memory
from ..part import Failed, Part
from ..runner.results import last_line
from ..texts import toy_text

__all__ = ["run", "tables"]

UPDATES, WARMUP = 60, 10
TOY_UPDATES, TOY_WARMUP = 6, 2
RESERVE = 4.0
"""Seconds before the limit at which the recipe is ended, whatever it is doing."""

LOOK_EVERY = 0.5


def run(part: Part) -> str:
    """Train, note what the run leaves while it goes on, and return the line for the summary."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Failed("deepspeed is not installed, which the recipe shards with")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        return train(part, Path(scratch) / "run")


def train(part: Part, folder: Path) -> str:
    """Train into a folder; see `run`.

    Raises:
        Failed: the recipe ended with another exit status than 0, did no update, or trained nothing.
    """
    updates, warmup = (TOY_UPDATES, TOY_WARMUP) if part.rehearse else (UPDATES, WARMUP)
    arguments = ["--steps", str(updates), "--precision", "bf16", "--zero_stage", "1", *sizes(part.rehearse)]
    part.record(command=shlex.join(["python", "recipes/bert.py", *arguments]), asked_updates=updates)
    with recipe_process([*arguments, "--output", str(folder)], on_cpu=part.rehearse) as process:
        part.record(promised=promised_memory(arguments))  # while it starts
        ended = follow(part, process, folder, warmup)
    if ended and process.returncode:
        log = part.output / "job.log"
        said = f": {last_line(log)[:200]}" if log.exists() else ""
        raise Failed(
            f"recipes/bert.py ended with exit status {process.returncode} after {part.found.get('updates', 0)} updates"
            f"{said}"
        )
    if not is_good(part.found):
        raise Failed(verdict(part.found))
    return verdict(part.found)


def sizes(toy: bool) -> list[str]:
    """Arguments of the recipe besides: none, which is its default preset, or a toy's."""
    # Losses come from the device together, and are on disk then.
    if not toy:
        return ["run.log_every=5"]
    batch = ["--global_batch", "32", "--micro_batch", "16"]
    return ["--data", *toy_text(), *batch, "data.vocabulary=1000", "run.log_every=2", "run.validate_every=3"]


def follow(part: Part, process: Popen[bytes], folder: Path, warmup: int) -> bool:
    """Record the run's numbers until it ends or the time is over; tell whether it has ended."""
    ended = False
    while not ended and part.left() > RESERVE:
        ended = wait(process, min(LOOK_EVERY, max(0.0, part.left() - RESERVE)))
        found = numbers_of(folder, warmup)
        if len(found.get("losses", ())) > len(part.found.get("losses", ())) or (ended and found):
            part.record(**found)
    return ended
