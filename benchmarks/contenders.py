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
from typing import Any

import torch

from trustratio.optimizers import LAMB, LARS

__all__ = ["BASELINE", "Contender", "dense_contenders", "timm_optimizer"]

BASELINE = "torch AdamW fused"
Parameters = Sequence[torch.nn.Parameter]


@dataclass(frozen=True)
class Contender:
    """One optimizer under one setting.

    Attributes:
        name: As it appears in tables.
        kind: "lamb", "lars" or "adam": what it computes.
        make: From parameters to an optimizer; may raise anything where it cannot be had.
        state_bytes: Bytes of state per parameter, to plan memory.
        compiles: Whether making the first one compiles an extension, which takes minutes.
    """

    name: str
    kind: str
    make: Callable[[Parameters], torch.optim.Optimizer]
    state_bytes: int
    compiles: bool = False


def dense_contenders(device: str) -> list[Contender]:
    """All that can step whole parameters on this kind of device."""
    kernel = "cpu" if device == "cpu" else "triton"
    ours = [Contender(f"trustratio LAMB ({name})", "lamb", _ours(LAMB, name), 8) for name in (kernel, "eager")] + [
        Contender(f"trustratio LARS ({name})", "lars", _ours(LARS, name), 4) for name in (kernel, "eager")
    ]
    torchs = [
        Contender(BASELINE, "adam", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), 8),
        Contender("torch AdamW foreach", "adam", lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), 8),
    ]
    others = [
        Contender("timm Lamb", "lamb", lambda p: timm_optimizer("lamb", "Lamb")(p, lr=1e-3, max_grad_norm=None), 8),
        Contender("timm Lars", "lars", lambda p: timm_optimizer("lars", "Lars")(p, lr=1e-3, momentum=0.9), 4),
        Contender("pytorch_optimizer Lamb", "lamb", _pytorch_optimizer("Lamb"), 8),
        Contender("pytorch_optimizer LARS", "lars", _pytorch_optimizer("LARS"), 4),
    ]
    deepspeeds = [
        Contender("DeepSpeed CPUAdam", "adam", _deepspeed_cpu_adam, 8, compiles=True)
        if device == "cpu"
        else Contender("DeepSpeed FusedLamb", "lamb", _deepspeed_fused_lamb, 8, compiles=True)
    ]
    apexes = [] if device == "cpu" else [Contender("apex FusedLAMB", "lamb", _apex_fused_lamb, 8)]
    return torchs + ours + deepspeeds + apexes + others


def _ours(optimizer: Any, implementation: str) -> Callable[[Parameters], torch.optim.Optimizer]:
    return lambda parameters: optimizer(parameters, lr=1e-3, implementation=implementation)


def _pytorch_optimizer(name: str) -> Callable[[Parameters], torch.optim.Optimizer]:
    return lambda parameters: getattr(importlib.import_module("pytorch_optimizer"), name)(parameters, lr=1e-3)


def _deepspeed_cpu_adam(parameters: Parameters) -> torch.optim.Optimizer:
    return importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(list(parameters), lr=1e-3)


def _deepspeed_fused_lamb(parameters: Parameters) -> torch.optim.Optimizer:
    return importlib.import_module("deepspeed.ops.lamb").FusedLamb(list(parameters), lr=1e-3)


def _apex_fused_lamb(parameters: Parameters) -> torch.optim.Optimizer:
    return importlib.import_module("apex.optimizers").FusedLAMB(list(parameters), lr=1e-3)


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
