"""How fast updates are, and which kernels they spend their time in."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronize
from trustratio.recipes.data.masking import MaskedBatch
from trustratio.recipes.training.loop import accumulate_step

from ..speed.devices import is_annotation
from .engine import Bench

__all__ = ["kernels", "measure_updates"]

LEAST_UPDATES, MOST_UPDATES = 2, 20
SHOWN = 15
"""Kernels in a table."""


def updates(bench: Bench, batches: list[MaskedBatch], count: int) -> float:
    """Seconds that `count` updates take, one after the other."""
    synchronize()
    began = time.perf_counter()
    for _ in range(count):
        accumulate_step(bench.engine, batches, stop_requested=False)
    synchronize()
    return time.perf_counter() - began


def measure_updates(bench: Bench, batches: list[MaskedBatch]) -> dict[str, Any]:
    """Seconds of an update after two for warming up, and what follows; "first_seconds" has compiling in it."""
    sequences = sum(len(batch.input_ids) for batch in batches)
    first, second = updates(bench, batches, 1), updates(bench, batches, 1)
    count = int(min(MOST_UPDATES, max(LEAST_UPDATES, bench.sizes.seconds / second)))
    reset_peak(bench.engine.device)
    seconds = updates(bench, batches, count) / count
    return {
        "first_seconds": round(first, 3),
        "updates": count,
        "seconds": seconds,
        "sequences_per_second": sequences / seconds,
        "model_flops_per_second": bench.flops(batches) / seconds,
        "peak_memory_bytes": peak_memory(bench.engine.device),
    }


def reset_peak(device: torch.device) -> None:
    """Count the peak of memory from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors took; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def kernels(bench: Bench, batches: list[MaskedBatch]) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operations) that take most of an update's time, with their share of all of it."""
    on_gpu = bench.engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        updates(bench, batches, 1)
    return most_time(profiled.key_averages(), on_gpu)


def most_time(events: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """The events of the device with the most time of their own."""
    if on_gpu:
        # The host's events have the time of the kernels that they launch, and so have ranges: counted twice.
        on_device = [event for event in events if event.device_type == DeviceType.CUDA]
        own = [(event.self_device_time_total, event) for event in on_device if not is_annotation(event, event.key)]
    else:
        own = [(event.self_cpu_time_total, event) for event in events]
    whole = sum(microseconds for microseconds, _ in own) or 1.0
    own.sort(key=lambda pair: -pair[0])
    return [
        {"name": event.key[:100], "milliseconds": us / 1e3, "share": us / whole, "calls": event.count}
        for us, event in own[:SHOWN]
    ]
