"""What weights, gradients and state take, seen from outside: resident memory of a process, or what CUDA allocates."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import LR
from benchmarks.shapes import Shape
from benchmarks.sixteen_bits.variants import VARIANTS, Variant
from trustratio.optimizers import LAMB, LARS

__all__ = ["MEASURED", "measure_memory"]

MEASURED: dict[str, Variant | None] = {
    "torch AdamW": None,
    **{name: variant for name, variant in VARIANTS.items() if not variant.is_nearest},
}
STEPS = 3
_MAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_SMALLEST_MAP = 1 << 16


def measure_memory(shapes: Sequence[Shape], device: str) -> dict[str, Any]:
    """Bytes per parameter that weights with gradients take, and how many more there are after three steps.

    In a process of its own, whose C library is made to return to the system whatever is freed.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (list(shapes), device))


def _measure(shapes: list[Shape], device: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    _c_library("mallopt", _MAP_THRESHOLD, _SMALLEST_MAP)  # each tensor that counts by itself
    elements = sum(map(prod, shapes))
    _grown(shapes, device, torch.float32, lambda parameters: torch.optim.AdamW(parameters, LR))  # what is loaded once
    rows: dict[str, Any] = {}
    for name, variant in MEASURED.items():
        for optimizer in ("AdamW",) if variant is None else ("LAMB", "LARS"):
            weights = torch.float32 if variant is None else variant.weights
            held, more = _grown(shapes, device, weights, _maker(optimizer, variant))
            rows[name if variant is None else f"{optimizer}, {name}"] = {
                "weights_and_gradients": held / elements,
                "state": more / elements,
            }
    return {"elements": elements, "layers": len(shapes), "rows": rows}


def _maker(optimizer: str, variant: Variant | None) -> Any:
    if variant is None:
        return lambda parameters: torch.optim.AdamW(parameters, LR, fused=True)
    ours = {"LAMB": LAMB, "LARS": LARS}[optimizer]
    return lambda parameters: ours(parameters, LR, **variant.options())


def _grown(shapes: list[Shape], device: str, dtype: torch.dtype, make: Any) -> tuple[int, int]:
    """Bytes of parameters and gradients, and how many more there are after some steps."""
    gc.collect()
    at_first = _held(device)
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02))
        parameter.grad = torch.empty_like(parameter, requires_grad=False).normal_(std=1e-3)
        parameters.append(parameter)
    before = _held(device)
    optimizer = make(parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody keeps masters
        for _ in range(STEPS):
            optimizer.step()
    gc.collect()
    return before - at_first, _held(device) - before


def _held(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    _c_library("malloc_trim", 0)  # what was freed and lies there counts when it is used again
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _c_library(name: str, *arguments: int) -> None:
    """Call a function that glibc has, where there is one."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
