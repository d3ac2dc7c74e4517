"""The recipe as a process of its own, whose numbers are read while it trains."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.on_gpu.table import middle
from trustratio.recipes.common.files import read_json
from trustratio.recipes.runs.folder import ENVIRONMENT, METRICS
from trustratio.recipes.runs.metrics import read_metrics

__all__ = ["ROOT", "numbers_of", "recipe_process", "wait"]

ROOT = Path(__file__).resolve().parents[3]
"""Of the project."""

_GONE_SECONDS = 1.0  # one that waits for a driver is not gone, whatever it is sent


@contextlib.contextmanager
def recipe_process(arguments: Sequence[str], on_cpu: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Run `recipes/bert.py` in this process's group; what still runs of it at the end of the block is killed."""
    environment = dict(os.environ)
    if on_cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "recipes/bert.py", *arguments], cwd=ROOT, env=environment)
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, who read data ahead and take no other signal."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GONE_SECONDS)


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for at most so long; tell whether the process has ended."""
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < seconds:
        time.sleep(0.05)
    return process.poll() is not None


def numbers_of(run: Path, warmup: int) -> dict[str, Any]:
    """What the run's folder has so far: {} before the first update.

    Args:
        run: folder of the run.
        warmup: updates whose times do not count.
    """
    if not (run / METRICS).exists():
        return {}
    records = read_metrics(run)
    updates = [record for record in records if record["kind"] == "train"]
    if not updates:
        return {}
    counted = updates[warmup:]
    peaks = [record["device_peak_memory_bytes"] for record in updates if "device_peak_memory_bytes" in record]
    return {
        "updates": updates[-1]["step"],
        "losses": [record["loss"] for record in updates],
        "sequences_per_second": middle(record["sequences_per_second"] for record in counted),
        "utilisation": middle(record.get("utilisation") for record in counted),
        "device_peak_memory_bytes": max(peaks, default=None),
        "host_memory_bytes": max(record["host_memory_bytes"] for record in updates),
        **_validations([record for record in records if record["kind"] == "validation"]),
        **_stages(run),
    }


def _validations(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not records:
        return {}
    kept = ("step", "validation_loss", "validation_accuracy")
    return {
        "validations": [{name: record[name] for name in kept} for record in records],
        "unigram_entropy": records[-1]["unigram_entropy"],
    }


def _stages(run: Path) -> dict[str, Any]:
    """Seconds by stage, which a run that has ended leaves."""
    if not (run / ENVIRONMENT).exists():
        return {}
    stages = read_json(run / ENVIRONMENT).get("stages", {})
    return {"stages": {name: round(stage["seconds"], 2) for name, stage in stages.items()}}
