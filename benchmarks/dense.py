"""Steps on whole parameters of one process: this package's, torch's and other packages' optimizers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contenders import BASELINE, Contender
from benchmarks.machine import available_memory
from benchmarks.shapes import Shape, make_parameters
from benchmarks.timing import alternate

__all__ = ["measure_dense", "time_steps"]


def measure_dense(shapes: list[Shape], device: str, rounds: int, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Time one step of every contender on parameters of the given shapes.

    All step the same parameters with the same gradients. As many as memory allows run in one batch, each batch with
    the baseline.

    Returns:
        Rows by name (see `Timing.summary`), and why a contender is missing.
    """
    parameters = make_parameters(shapes, device)
    elements = sum(p.numel() for p in parameters)
    baseline = next(c for c in contenders if c.name == BASELINE)
    rows: dict[str, Any] = {}
    for batch in _batches([c for c in contenders if c is not baseline], elements, available_memory(device)):
        rows.update(time_steps([baseline, *batch], parameters, rounds))
    return {"elements": elements, "layers": len(parameters), "rows": rows}


def time_steps(contenders: Sequence[Contender], parameters: list[torch.nn.Parameter], rounds: int) -> dict[str, Any]:
    """Time the contenders, of which the first is the baseline, in turn."""
    steps: dict[str, Callable[[], object]] = {}
    missing: dict[str, Any] = {}
    for contender in contenders:
        try:
            step = contender.make(parameters).step
            step()
        except Exception as error:  # whatever another package fails with here
            missing[contender.name] = {"kind": contender.kind, "missing": f"{type(error).__name__}: {error}"[:200]}
        else:
            steps[contender.name] = step
    timings = alternate(steps, contenders[0].name, rounds)
    kinds = {contender.name: contender.kind for contender in contenders}
    rows = {name: {"kind": kinds[name], **timing.summary()} for name, timing in timings.items()}
    steps.clear()
    gc.collect()
    return {**rows, **missing}


def _batches(contenders: list[Contender], elements: int, memory: int) -> list[list[Contender]]:
    """Contenders whose states fit into memory together with a baseline's and with temporaries of one contender."""
    room = 0.8 * memory - (8 + 16) * elements
    batches: list[list[Contender]] = [[]]
    taken = 0
    for contender in contenders:
        if batches[-1] and taken + contender.state_bytes * elements > room:
            batches.append([])
            taken = 0
        batches[-1].append(contender)
        taken += contender.state_bytes * elements
    return batches
