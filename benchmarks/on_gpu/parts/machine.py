"""The device, the versions, and how fast it copies."""

from __future__ import annotations

from benchmarks.machine import available_memory, copy_bandwidth, describe_machine

from ..part import Part

__all__ = ["run"]


def run(part: Part) -> str:
    """Measure, and return the line for the summary."""
    part.record(**describe_machine(part.device), available_bytes=available_memory(part.device))
    bandwidth = copy_bandwidth(part.device, 1 << (20 if part.rehearse else 28))
    part.record(copy_bytes_per_second=bandwidth)
    return f"copies at {bandwidth / 1e9:.0f} GB/s, read and written"
