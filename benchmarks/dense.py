"""Steps on whole parameters of one process: this package's, torch's and other packages' optimizers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contenders import BASELINE, Contender, Parameters
from benchmarks.machine import available_memory
from benchmarks.shapes import Shape, make_parameters
from benchmarks.timing import alternate

__all__ = ["TEMPORARIES", "make_steps", "measure_dense", "time_steps"]

KEPT_GRADIENTS = 4  # bytes per parameter
TEMPORARIES = 8  # bytes per parameter: twice what any contender was seen to take


def measure_dense(shapes: list[Shape], device: str, rounds: int, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Time one step of every contender on parameters of the given shapes.

    All step the same parameters with the same gradients. As many as memory allows run in one batch, each batch with
    those that run `everywhere`.

    Returns:
        For each batch its rows by name (see `Timing.summary`), which also say why a contender is missing. Only times
        of one batch are comparable.
    """
    parameters = make_parameters(shapes, device)
    elements = sum(p.numel() for p in parameters)
    batches = [
        time_steps(batch, parameters, rounds) for batch in _batches(contenders, elements, available_memory(device))
    ]
    return {"elements": elements, "layers": len(parameters), "batches": batches}


def time_steps(contenders: Sequence[Contender], parameters: list[torch.nn.Parameter], rounds: int) -> dict[str, Any]:
    """Time the contenders, the baseline among them, in turn; each finds the gradients as they were at first."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    kept = [gradient.clone() for gradient in gradients]

    def restore(_: str) -> None:
        torch._foreach_copy_(gradients, kept)  # some contenders work in the gradients' memory

    steps, missing = make_steps(contenders, lambda: parameters, restore)
    timings = alternate(steps, BASELINE, rounds, prepare=restore)
    kinds = {contender.name: contender.kind for contender in contenders}
    rows = {name: {"kind": kinds[name], **timing.summary()} for name, timing in timings.items()}
    restore("")
    steps.clear()
    gc.collect()
    return {**rows, **missing}


def make_steps(
    contenders: Sequence[Contender],
    parameters: Callable[[], Parameters],
    prepare: Callable[[str], object],
    first_steps: int = 1,
) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """The steps of those that can be had and have taken their first steps, and rows that say why the others cannot.

    Args:
        contenders: Whom to make.
        parameters: What makes the argument of each: parameters to step, or groups of it.
        prepare: Called with a contender's name before each step.
        first_steps: How many to take here.
    """
    steps: dict[str, Callable[[], object]] = {}
    missing: dict[str, Any] = {}
    for contender in contenders:
        try:
            step = contender.make(parameters()).step
            for _ in range(first_steps):
                prepare(contender.name)
                step()
        except Exception as error:  # whatever another package fails with here
            missing[contender.name] = {"kind": contender.kind, "missing": f"{type(error).__name__}: {error}"[:200]}
        else:
            steps[contender.name] = step
    return steps, missing


def _batches(contenders: Sequence[Contender], elements: int, memory: int) -> list[list[Contender]]:
    """Contenders whose states memory holds together, each time with those that run everywhere."""
    always = [c for c in contenders if c.everywhere]
    used = KEPT_GRADIENTS + TEMPORARIES + sum(c.state_bytes for c in always)
    room = 0.9 * memory / elements - used
    batches: list[list[Contender]] = [[]]
    for contender in sorted((c for c in contenders if not c.everywhere), key=lambda c: -c.state_bytes):
        fitting = (b for b in batches if not b or sum(c.state_bytes for c in [*b, contender]) <= room)
        batch = next(fitting, None)
        if batch is None:
            batches.append(batch := [])
        batch.append(contender)
    return [always + batch for batch in batches]
