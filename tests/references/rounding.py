"""Stochastic rounding to bf16 in plain Python integers, one number at a time; shares nothing with the package."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

import torch

from .common import Tensor

MODULUS = 1 << 64


def mixed(z: int) -> int:
    """SplitMix64's mixing of 64 bits (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return z ^ (z >> 31)


def hashed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def gamma_of(seed: int, layer: str) -> int:
    gamma = hashed("gamma", seed, layer) | 1
    bits = f"{gamma:064b}"
    changes = sum(a != b for a, b in zip("0" + bits, bits, strict=False))
    return gamma if changes >= 24 else gamma ^ 0xAAAAAAAAAAAAAAAA


class Chances:
    """The random numbers of a layer in one of its steps, which are counted from 1."""

    def __init__(self, seed: int, layer: str, step: int):
        self.key = mixed((hashed(seed, layer) + (step + 1) * 0x9E3779B97F4A7C15) % MODULUS)
        self.gamma = gamma_of(seed, layer)

    def word(self, position: int, number: int) -> int:
        return mixed((self.key + number * 0xD1B54A32D192ED03 + (position + 1) * self.gamma) % MODULUS)

    def field(self, position: int, number: int) -> int:
        """16 bits."""
        return self.word(position, number // 4) >> 16 * (number % 4) & 0xFFFF

    def of_state(self, position: int, index: int) -> int:
        return self.field(position, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14][index])

    def of_weights(self, position: int) -> int:
        return self.field(position, 3)


def bits_of(x: float) -> int:
    """Of the nearest fp32 number."""
    with_infinities = x if not math.isfinite(x) or abs(x) < 3.4028235677973366e38 else math.copysign(math.inf, x)
    return int(struct.unpack("<I", struct.pack("<f", with_infinities))[0])


def rounded(x: float, random: int) -> float:
    """Up to the next bf16 number if the 16 bits that bf16 lacks and the random ones make a carry, else down."""
    if math.isnan(x):
        return x
    return float(struct.unpack("<f", struct.pack("<I", bits_of(x) + random & 0xFFFF0000))[0])


class RoundedState:
    """Makes of new element-wise state what is kept of it; a reference finds it in its state as "keep".

    Args:
        chances: Of the layer in this step.
        places: The index of each state that is rounded, by the reference's name.
    """

    def __init__(self, chances: Chances, places: dict[str, int]):
        self.chances, self.places = chances, places

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self.places:
            return x
        index = self.places[name]
        numbers = [rounded(e, self.chances.of_state(i, index)) for i, e in enumerate(x.flatten().tolist())]
        return torch.tensor(numbers, dtype=torch.float64).reshape(x.shape)


def kept(state: dict[str, Any], **values: Tensor) -> list[Tensor]:
    """Set new state by its name and return it as it is kept."""
    keep = state.get("keep")
    state.update({name: x if keep is None else keep(name, x) for name, x in values.items()})
    return [state[name] for name in values]
