"""What a measurement was made on: stored with every result."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.timing import quartiles, synchronize
from trustratio.recipes.common.machine import describe_machine as describe_processor

__all__ = ["available_memory", "copy_bandwidth", "describe_machine"]

PACKAGES = ("torch", "deepspeed", "timm", "pytorch_optimizer", "triton", "apex")


def describe_machine(device: str) -> dict[str, object]:
    """Processor or GPU, threads, versions, and the load by others when the measurement began."""
    return {
        **describe_processor(device, PACKAGES),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def copy_bandwidth(device: str, elements: int = 1 << 27, rounds: int = 9) -> float:
    """Bytes per second, read and written, that copying fp32 tensors of `elements` gets; the median of `rounds`."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 8 * elements / quartiles(seconds)[1]


def available_memory(device: str) -> int:
    """Bytes that can still be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if sys.platform == "linux":
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
