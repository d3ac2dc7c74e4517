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

__all__ = ["measure_memory", "peak_above"]


def measure_memory(shapes: list[Shape], device: str, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Bytes that the third step of each contender takes at most above what is allocated before it.

    What torch allocates is counted, which all contenders use for tensors. Resident memory would say nothing: the
    C library keeps what earlier steps have freed.
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    return max(held, default=0)
