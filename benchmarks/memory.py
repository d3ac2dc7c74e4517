"""Peak memory of a step above parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Contender
from benchmarks.shapes import Shape, make_parameters

__all__ = ["halved", "measure_memory", "peak_above", "step_memory"]


def measure_memory(shapes: list[Shape], device: str, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Bytes that the third step of each contender takes at most above what is allocated before it.

    What torch allocates is counted, which all contenders use for tensors. Resident memory would say nothing: the
    C library keeps what earlier steps have freed. Taken a second time with half the elements in as many layers: what
    is O(layers) does not change.
    """
    half = halved(shapes)
    rows: dict[str, Any] = {}
    for contender in (c for c in contenders if c.kind != "copy"):
        try:
            rows[contender.name] = {
                "bytes": step_memory(contender, shapes, device),
                "bytes_half": step_memory(contender, half, device),
            }
        except Exception as error:
            rows[contender.name] = {"missing": f"{type(error).__name__}: {error}"[:200]}
    elements, half_elements = (sum(map(prod, size)) for size in (shapes, half))
    return {"elements": elements, "elements_half": half_elements, "layers": len(shapes), "rows": rows}


def step_memory(contender: Contender, shapes: list[Shape], device: str) -> int:
    """Bytes that the contender's third step takes at most."""
    optimizer = contender.make(make_parameters(shapes, device))
    for _ in range(2):
        optimizer.step()
    return peak_above(optimizer.step, device)


def halved(shapes: list[Shape]) -> list[Shape]:
    """As many layers with half the rows each."""
    return [(max(1, rows // 2), *rest) for rows, *rest in shapes]


def peak_above(work: Callable[[], object], device: str) -> int:
    """Bytes that `work` takes at most above what was allocated when it began."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    return max(held, default=0)
