"""Optimizers to compare: this package's, torch's, and those of other packages where they are installed.

A contender is made from a list of parameters. One that cannot be had here says why, and is listed with that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from trustratio.optimizers import LAMB, LARS

__all__ = [
    "ADAM_DECAY",
    "BASELINE",
    "COPY",
    "LARS_DECAY",
    "LR",
    "Contender",
    "Parameters",
    "Stepper",
    "dense_contenders",
    "timm_optimizer",
]

BASELINE = "torch AdamW fused"
COPY = "copy of the weights"
# The same for all of a kind: without weight decay, some skip not only the decay but the norms too.
ADAM_DECAY = 0.01
LARS_DECAY = 1e-4
LR = 1e-3
Parameters = Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]]
"""To step, or groups of it."""


class Stepper(Protocol):
    """What a contender makes of parameters: an optimizer, or what is timed in its place."""

    def step(self) -> object: ...


@dataclass(frozen=True)
class Contender:
    """One optimizer under one setting.

    Attributes:
        name: As it appears in tables.
        kind: "lamb", "lars", "adam" or "copy": what it computes.
        make: From parameters to an optimizer; may raise anything where it cannot be had.
        state_bytes: Bytes of state per parameter, to plan memory.
        compiles: Whether making the first one compiles an extension, which takes minutes.
        everywhere: Whether it runs beside all others, where memory does not hold all at once.
    """

    name: str
    kind: str
    make: Callable[[Parameters], Stepper]
    state_bytes: int
    compiles: bool = False
    everywhere: bool = False


def dense_contenders(device: str) -> list[Contender]:
    """All that can step whole parameters on this kind of device."""
    kernel = "cpu" if device == "cpu" else "triton"
    ours = [
        Contender(f"trustratio LAMB ({kernel})", "lamb", _ours_lamb(kernel), 8, everywhere=True),
        Contender("trustratio LAMB (eager)", "lamb", _ours_lamb("eager"), 8),
        Contender(f"trustratio LARS ({kernel})", "lars", _ours_lars(kernel), 4, everywhere=True),
        Contender("trustratio LARS (eager)", "lars", _ours_lars("eager"), 4),
    ]
    torchs = [
        Contender(BASELINE, "adam", _torch_adamw(fused=True), 8, everywhere=True),
        Contender("torch AdamW foreach", "adam", _torch_adamw(foreach=True), 8),
        Contender(COPY, "copy", Copy, 8),
    ]
    others = [
        Contender("timm Lamb", "lamb", _timm_lamb, 8),
        Contender("timm Lars", "lars", _timm_lars, 4),
        Contender("pytorch_optimizer Lamb", "lamb", _pytorch_optimizer_lamb, 8),
        Contender("pytorch_optimizer LARS", "lars", _pytorch_optimizer_lars, 4),
    ]
    deepspeeds = [
        Contender("DeepSpeed CPUAdam", "adam", _deepspeed_cpu_adam, 8, compiles=True)
        if device == "cpu"
        else Contender("DeepSpeed FusedLamb", "lamb", _deepspeed_fused_lamb, 8, compiles=True)
    ]
    apexes = [] if device == "cpu" else [Contender("apex FusedLAMB", "lamb", _apex_fused_lamb, 8)]
    return torchs + ours + deepspeeds + apexes + others


class Copy:
    """Copies as many numbers as there are parameters: 8 bytes per parameter at the speed that memory has."""

    def __init__(self, parameters: Parameters) -> None:
        tensors = [p for one in parameters for p in (one["params"] if isinstance(one, dict) else (one,))]
        self.source = torch.ones(sum(p.numel() for p in tensors), device=tensors[0].device)
        self.target = torch.empty_like(self.source)

    def step(self) -> None:
        self.target.copy_(self.source)


def _ours_lamb(implementation: str) -> Callable[[Parameters], Stepper]:
    return lambda parameters: LAMB(parameters, LR, weight_decay=ADAM_DECAY, implementation=implementation)


def _ours_lars(implementation: str) -> Callable[[Parameters], Stepper]:
    return lambda parameters: LARS(parameters, LR, weight_decay=LARS_DECAY, implementation=implementation)


def _torch_adamw(**implementation: Any) -> Callable[[Parameters], Stepper]:
    return lambda parameters: torch.optim.AdamW(parameters, LR, weight_decay=ADAM_DECAY, **implementation)


def _timm_lamb(parameters: Parameters) -> Stepper:
    return timm_optimizer("lamb", "Lamb")(parameters, LR, weight_decay=ADAM_DECAY, max_grad_norm=None)


def _timm_lars(parameters: Parameters) -> Stepper:
    lars = timm_optimizer("lars", "Lars")
    return lars(parameters, LR, momentum=0.9, weight_decay=LARS_DECAY, always_adapt=True)


def _pytorch_optimizer_lamb(parameters: Parameters) -> Stepper:
    """Decay inside the ratio, as in the paper, and no clipping; bias correction is not to be had."""
    lamb = importlib.import_module("pytorch_optimizer").Lamb
    return lamb(parameters, LR, weight_decay=ADAM_DECAY, weight_decouple=False, max_grad_norm=0.0)


def _pytorch_optimizer_lars(parameters: Parameters) -> Stepper:
    return importlib.import_module("pytorch_optimizer").LARS(parameters, LR, weight_decay=LARS_DECAY)


def _deepspeed_cpu_adam(parameters: Parameters) -> Stepper:
    return importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(list(parameters), LR, weight_decay=ADAM_DECAY)


def _deepspeed_fused_lamb(parameters: Parameters) -> Stepper:
    return importlib.import_module("deepspeed.ops.lamb").FusedLamb(list(parameters), LR, weight_decay=ADAM_DECAY)


def _apex_fused_lamb(parameters: Parameters) -> Stepper:
    fused_lamb = importlib.import_module("apex.optimizers").FusedLAMB
    return fused_lamb(list(parameters), LR, weight_decay=ADAM_DECAY, max_grad_norm=0.0)


def timm_optimizer(module: str, name: str) -> Any:
    """A class of timm.optim, from its file alone: importing the package needs a torchvision that fits torch.

    Raises:
        ImportError: If timm is not installed.
    """
    if "timm" in sys.modules:
        return getattr(importlib.import_module(f"timm.optim.{module}"), name)
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("timm is not installed: pip install --no-deps timm")
    with _bare_packages(Path(spec.submodule_search_locations[0])):
        return getattr(importlib.import_module(f"timm.optim.{module}"), name)


@contextmanager
def _bare_packages(folder: Path) -> Iterator[None]:
    for name in ("timm", "timm.optim"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
