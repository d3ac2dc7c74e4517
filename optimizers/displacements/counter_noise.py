"""Noise that is a function of a key and a position alone; see `formulas.split_mix`."""

from __future__ import annotations

import math

import torch

from ..formulas.split_mix import logical_shift, split_mix
from ..sharding.local_tensors import has_fp64

__all__ = ["gaussian", "uniform"]


def uniform(key: int, positions: torch.Tensor) -> torch.Tensor:
    """Numbers uniform in (-√3, √3), of mean 0 and variance 1; fp64, fp32 where the device has no fp64."""
    return (2 * _fraction(logical_shift(split_mix(key, positions), 32)) - 1) * math.sqrt(3)


def gaussian(key: int, positions: torch.Tensor) -> torch.Tensor:
    """Numbers of the standard normal distribution, by Box and Muller (1958); none is beyond 6.8. dtype as `uniform`."""
    bits = split_mix(key, positions)
    radius, angle = _fraction(logical_shift(bits, 32)), _fraction(bits & 0xFFFFFFFF)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def _fraction(bits: torch.Tensor) -> torch.Tensor:
    """32 bits as a number in (0, 1)."""
    dtype = torch.float64 if has_fp64(bits.device) else torch.float32
    return ((bits.to(dtype) + 0.5) * 2.0**-32).clamp(max=1 - torch.finfo(dtype).eps)
