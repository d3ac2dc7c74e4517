"""Times of dense steps with state in fp32 and in bf16, beside torch's fused AdamW."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contenders import ADAM_DECAY, BASELINE, LARS_DECAY, LR
from benchmarks.shapes import Shape, make_parameters
from benchmarks.timing import alternate
from trustratio.optimizers import LAMB, LARS, VRLAMB

__all__ = ["MOVED", "measure_steps", "measure_variance_reduced"]

Parameters = list[torch.nn.Parameter]

MOVED = {
    BASELINE: 28,
    "LAMB, fp32 state": 40,
    "LAMB, bf16 state": 28,
    "LARS, fp32 state": 28,
    "LARS, bf16 state": 24,
    "VRLAMB, fp32 state": 60,
    "VRLAMB, bf16 state": 44,
}
"""Bytes per parameter that two sweeps (VRLAMB: three) have to read and write; see docs/kernels.md."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
GROUPS = 2  # of samples, in a step of VRLAMB


def _adamw(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, LR, weight_decay=ADAM_DECAY, fused=True)


def measure_steps(shapes: Sequence[Shape], device: str, rounds: int) -> dict[str, Any]:
    """Time AdamW, LAMB and LARS in turn, on the same parameters with the same gradients."""
    parameters = make_parameters(list(shapes), device)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {BASELINE: lambda: _adamw(parameters)}
    for name, dtype in DTYPES.items():
        makers[f"LAMB, {name} state"] = lambda dtype=dtype: LAMB(parameters, LR, state_dtype=dtype)  # type: ignore[misc]
        makers[f"LARS, {name} state"] = lambda dtype=dtype: LARS(  # type: ignore[misc]
            parameters, LR, weight_decay=LARS_DECAY, state_dtype=dtype
        )
    return _timed(makers, rounds, parameters)


def measure_variance_reduced(shapes: Sequence[Shape], device: str, rounds: int) -> dict[str, Any]:
    """Time AdamW and VRLAMB in turn, each on parameters of its own: hooks on them see the gradients of groups."""
    parameters = make_parameters(list(shapes), device)
    of_name = {f"VRLAMB, {name} state": make_parameters(list(shapes), device) for name in DTYPES}
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {BASELINE: lambda: _adamw(parameters)}
    for (name, own), dtype in zip(of_name.items(), DTYPES.values(), strict=True):
        makers[name] = lambda own=own, dtype=dtype: VRLAMB(own, LR, state_dtype=dtype)  # type: ignore[misc]

    def show_groups(name: str) -> None:
        for parameter in of_name.get(name, ()):
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            for group in range(GROUPS):  # whose mean is the gradient as it was
                (parameter * gradient * (2.0 * (group + 1) / (GROUPS + 1) / GROUPS)).sum().backward()

    return _timed(makers, rounds, parameters, show_groups)


def _timed(
    makers: dict[str, Callable[[], torch.optim.Optimizer]],
    rounds: int,
    parameters: Parameters,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    steps = {name: make().step for name, make in makers.items()}
    timings = alternate(steps, BASELINE, rounds, prepare=prepare)
    rows = {name: {**timing.summary(), "moved": MOVED[name]} for name, timing in timings.items()}
    steps.clear()
    gc.collect()
    return {"elements": sum(p.numel() for p in parameters), "layers": len(parameters), "rows": rows}
