"""The device, the versions, and how fast it copies and multiplies."""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch

from benchmarks.machine import available_memory, copy_bandwidth, describe_machine
from benchmarks.timing import synchronize

from ..part import Part

__all__ = ["run", "tables"]

TOOLS = ("nvcc", "gcc", "ninja", "compute-sanitizer")
REPETITIONS = 10


def run(part: Part) -> str:
    """Measure, and return the line for the summary."""
    part.record(**describe_machine(part.device), available_bytes=available_memory(part.device))
    part.record(**_facts(part.device), tools=[tool for tool in TOOLS if shutil.which(tool)])
    bandwidth = copy_bandwidth(part.device, 1 << (20 if part.rehearse else 28))
    part.record(copy_bytes_per_second=bandwidth)
    products = _operations_per_second(part.device, 256 if part.rehearse else 8192)
    part.record(bf16_operations_per_second=products)
    return f"copies at {bandwidth / 1e9:.0f} GB/s, read and written; multiplies bf16 at {products / 1e12:.1f} TFLOP/s"


def tables(found: dict[str, Any]) -> str:
    """A sentence or two for docs/benchmarks.md."""
    if "copy_bytes_per_second" not in found:
        return "not measured"
    packages = ("cuda", "torch", "triton", "deepspeed")
    versions = ", ".join(f"{name} {found[name]}" for name in packages if found.get(name))
    products = found.get("bf16_operations_per_second")
    speed = f", and multiplies bf16 matrices at {products / 1e12:,.0f} TFLOP/s" if products else ""
    return (
        f"{found.get('device', 'A device')}; {versions}. It copies at {found['copy_bytes_per_second'] / 1e9:,.0f} "
        f"GB/s, bytes read and written{speed}."
    )


def _facts(device: str) -> dict[str, Any]:
    """Of a GPU, what its speed depends on."""
    if device != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "total_bytes": properties.total_memory,
        "devices": torch.cuda.device_count(),
    }


def _operations_per_second(device: str, size: int) -> float:
    """What products of two square bf16 matrices get."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = 0.0
    for repetitions in (2, REPETITIONS):  # the first ones warm up
        synchronize()
        began = time.perf_counter()
        for _ in range(repetitions):
            a @ b
        synchronize()
        seconds = time.perf_counter() - began
    return REPETITIONS * 2.0 * size**3 / seconds
