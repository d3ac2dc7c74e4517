"""Who is measured, and how many bytes a step has to move."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from benchmarks.contenders import (
    ADAM_DECAY,
    BASELINE,
    COPY,
    LARS_DECAY,
    LR,
    Contender,
    Parameters,
    Stepper,
    dense_contenders,
)
from trustratio.optimizers import create_optimizer

from .builds import BUILDERS

__all__ = ["BYTES", "IN_MICRO_BATCHES", "OURS", "ours_with", "with_extensions", "without_extensions"]

OURS = {
    "trustratio LAMB (triton)": "lamb",
    "trustratio LARS (triton)": "lars",
    "trustratio LANS (triton)": "lans",
    "trustratio VRLAMB (triton)": "vrlamb",
}
"""Registered names, by the names in tables; in the order of their worth."""

IN_MICRO_BATCHES = frozenset({"trustratio VRLAMB (triton)"})
"""Those that see the gradients of single micro-batches, in backward."""

BYTES = {
    COPY: 8,
    BASELINE: 28,
    "trustratio LAMB (triton)": 40,
    "trustratio LARS (triton)": 28,
    "trustratio LANS (triton)": 48,
    "trustratio VRLAMB (triton)": 60,
    "DeepSpeed FusedAdam": 28,
}
"""That a step reads and writes per parameter, in fp32; docs/kernels.md has the sweeps.

VRLAMB: sums of multipliers (read g, s), measure (read w, g, m, v, p, s; write m, v, p), apply (read w, m, v; write w).
What compares its statistics with the gradient beforehand is not among them.
"""

OTHERS = ("timm Lamb", "timm Lars", "apex FusedLAMB", "pytorch_optimizer Lamb", "pytorch_optimizer LARS")


def without_extensions() -> tuple[list[Contender], list[Contender]]:
    """All that needs no compiler: first LAMB and what it is compared with, then the others."""
    known = {contender.name: contender for contender in dense_contenders("cuda")}
    lamb, *ours = (known.get(name) or _ours(name) for name in OURS)
    compared = [known[name] for name in (COPY, BASELINE)]
    return [*compared, lamb, known["torch AdamW foreach"]], [*compared, *ours, *(known[name] for name in OTHERS)]


def with_extensions(outcomes: dict[str, str]) -> list[Contender]:
    """Those of DeepSpeed that are built, and what they are compared with; none if none is built."""
    known = {contender.name: contender for contender in dense_contenders("cuda")}
    known["DeepSpeed FusedAdam"] = Contender("DeepSpeed FusedAdam", "adam", _deepspeed_fused_adam, 8, compiles=True)
    built = [known[name] for name in BUILDERS if outcomes.get(name) == ""]
    return [known[name] for name in (COPY, BASELINE, next(iter(OURS)))] + built if built else []


def ours_with(name: str, lr: Any) -> Callable[[Parameters], Stepper]:
    """What makes one of ours with this learning rate, a number or a tensor on the device."""
    decay = LARS_DECAY if OURS[name] == "lars" else ADAM_DECAY
    options: dict[str, Any] = {"lr": lr, "weight_decay": decay, "implementation": "triton"}
    return lambda parameters: create_optimizer(OURS[name], parameters, **options)


def _ours(name: str) -> Contender:
    return Contender(name, "lamb", ours_with(name, LR), 12 if name in IN_MICRO_BATCHES else 8)


def _deepspeed_fused_adam(parameters: Parameters) -> Stepper:
    fused_adam = importlib.import_module("deepspeed.ops.adam").FusedAdam
    return fused_adam(list(parameters), LR, weight_decay=ADAM_DECAY)
