"""Numbers that look random and are a function of a key and a position alone: nothing is stored, and no order matters.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), of which the number at
position i is mix(key + (i + 1) · 0x9E3779B97F4A7C15), all modulo 2^64: torch's int64 arithmetic wraps around.
"""

from __future__ import annotations

import hashlib
import math

import torch

from ..sharding.local_tensors import has_fp64

__all__ = ["gaussian", "key_of", "split_mix", "uniform"]

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(*parts: object) -> int:
    """A key of 64 bits for numbers and texts, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def split_mix(key: int, positions: torch.Tensor) -> torch.Tensor:
    """64 random bits for each position.

    Args:
        key: Of the sequence, in [0, 2^64).
        positions: int64, of any shape, each at least 0.

    Returns:
        int64, of the same shape.
    """
    bits = (positions + 1) * _signed(GAMMA) + _signed(key)
    bits = (bits ^ _shifted(bits, 30)) * _signed(FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(SECOND)
    return bits ^ _shifted(bits, 31)


def uniform(key: int, positions: torch.Tensor) -> torch.Tensor:
    """Numbers uniform in (-√3, √3), of mean 0 and variance 1; fp64, fp32 where the device has no fp64."""
    return (2 * _fraction(_shifted(split_mix(key, positions), 32)) - 1) * math.sqrt(3)


def gaussian(key: int, positions: torch.Tensor) -> torch.Tensor:
    """Numbers of the standard normal distribution, by Box and Muller (1958); none is beyond 6.8. dtype as `uniform`."""
    bits = split_mix(key, positions)
    radius, angle = _fraction(_shifted(bits, 32)), _fraction(bits & 0xFFFFFFFF)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def _fraction(bits: torch.Tensor) -> torch.Tensor:
    """32 bits as a number in (0, 1)."""
    dtype = torch.float64 if has_fp64(bits.device) else torch.float32
    return ((bits.to(dtype) + 0.5) * 2.0**-32).clamp(max=1 - torch.finfo(dtype).eps)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shifted to the right, with zeros from the left."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    """The same 64 bits, as int64 reads them."""
    return number - (1 << 64) if number >> 63 else number
