"""Peak memory of a step above parameters, gradients and state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Contender
from benchmarks.shapes import Shape, make_parameters

__all__ = ["measure_memory", "peak_above"]


def measure_memory(shapes: list[Shape], device: str, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Bytes that the third step of each contender takes at most above what is allocated before it.

    On a CPU the process' resident memory is measured (Linux alone), in steps of a page and with the allocator's own
    reserves, so small numbers mean "nothing of the model's size".
    """
    rows: dict[str, Any] = {}
    for contender in contenders:
        parameters = make_parameters(shapes, device)
        try:
            optimizer = contender.make(parameters)
            optimizer.step()
        except Exception as error:
            rows[contender.name] = {"missing": f"{type(error).__name__}: {error}"[:200]}
            continue
        optimizer.step()
        rows[contender.name] = {"bytes": peak_above(optimizer.step, device)}
        del optimizer, parameters
    elements = sum(prod(shape) for shape in shapes)
    return {"elements": elements, "layers": len(shapes), "rows": rows}


def peak_above(work: Callable[[], object], device: str) -> int:
    """Bytes that `work` takes at most above what was allocated when it began."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        raise OSError("peak memory of a CPU step is read from /proc, which only Linux has")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
