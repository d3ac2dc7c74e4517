"""The choice of who computes a step: compiled sweeps where they can be had, tensor operations everywhere else.

`None` chooses by device. Otherwise the optimizer's argument counts, then the environment variable
TRUSTRATIO_IMPLEMENTATION.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from .combined import CombinedSweeps
from .interface import ImplementationError, Kernels, Operands

__all__ = ["IMPLEMENTATIONS", "choose", "open_sweeps"]

IMPLEMENTATIONS = ("eager", "cpu", "triton")
VARIABLE = "TRUSTRATIO_IMPLEMENTATION"
_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_MODULES = {"cpu": "cpu", "triton": "triton_kernels"}


def open_sweeps(
    requested: str | None, operands: Operands, takes_part: Sequence[bool], cache: dict[Any, Any]
) -> CombinedSweeps:
    """Begin a step.

    Args:
        requested: One of `IMPLEMENTATIONS`, or None.
        operands: Of the step.
        takes_part: Which local tensors are measured and updated.
        cache: Lives as long as the layout.

    Raises:
        ImplementationError: As `choose`.
        ValueError: As `choose`.
    """
    kernels = choose(requested, operands.layout.device)
    sweeps = CombinedSweeps(kernels, operands, takes_part, cache)
    if kernels is not None and sweeps.remaining is not None:
        _warn_of_others(requested)
    return sweeps


def choose(requested: str | None, device: torch.device) -> Kernels | None:
    """The compiled kernels to use for parameters on a device; None for tensor operations alone.

    Args:
        requested: One of `IMPLEMENTATIONS`, or None.
        device: Of the parameters.

    Raises:
        ImplementationError: If an implementation was asked for that is not there or does not work on this device.
        ValueError: If the environment variable has an unknown value.
    """
    asked = requested or os.environ.get(VARIABLE) or None
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(IMPLEMENTATIONS)}, got {asked!r}")
    name = asked or _OF_DEVICE.get(device.type, "eager")
    if name == "eager":
        return None
    kernels = _load(name)
    missing = kernels.missing()
    if missing is None and device.type not in kernels.devices():
        missing = f"parameters on {' or '.join(kernels.devices())}, got {device}"
    missing = missing or kernels.unable(device)
    if missing is None:
        return kernels
    if asked is not None:
        raise ImplementationError(f"implementation {name!r} needs {missing}; without, use 'eager'")
    _warn_once(f"steps are computed by tensor operations (implementation 'eager'), because {name!r} needs {missing}")
    return None


def _warn_of_others(requested: str | None) -> None:
    """Say once, if an implementation was asked for, that it does not serve all tensors."""
    asked = requested or os.environ.get(VARIABLE)
    if asked:
        _warn_once(
            f"implementation {asked!r} serves weights and gradients in fp32, bf16 and fp16 with state in fp32 or bf16 "
            "on one device; other tensors are computed by tensor operations"
        )


def _load(name: str) -> Kernels:
    kernels: Kernels = import_module(f".{_MODULES[name]}", __package__).KERNELS
    return kernels


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
