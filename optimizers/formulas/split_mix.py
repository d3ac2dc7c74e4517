"""Numbers that look random and are a function of a key and a position alone: nothing is stored, and no order matters.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), of which the number at
position i is mix(key + (i + 1) · γ), all modulo 2^64: torch's int64 arithmetic wraps around. Sequences with a γ of
their own have no runs of numbers in common.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["GAMMA", "gamma_of", "key_of", "logical_shift", "signed", "split_mix"]

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(*parts: object) -> int:
    """A key of 64 bits for numbers and texts, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def gamma_of(*parts: object) -> int:
    """A γ for numbers and texts: odd, and with 24 changes between neighbouring bits at least, as the paper asks for."""
    gamma = key_of("gamma", *parts) | 1
    return gamma if (gamma ^ (gamma >> 1)).bit_count() >= 24 else gamma ^ 0xAAAAAAAAAAAAAAAA


def split_mix(key: int | torch.Tensor, positions: torch.Tensor, gamma: int | torch.Tensor = GAMMA) -> torch.Tensor:
    """64 random bits for each position.

    Args:
        key: Of the sequence, in [0, 2^64), or int64 tensors with those bits, that go with the positions.
        positions: int64, of any shape, each at least 0.
        gamma: Of the sequence, likewise.

    Returns:
        int64, of the positions' shape.
    """
    bits = (positions + 1) * signed(gamma) + signed(key)
    bits = (bits ^ logical_shift(bits, 30)) * signed(FIRST)
    bits = (bits ^ logical_shift(bits, 27)) * signed(SECOND)
    return bits ^ logical_shift(bits, 31)


def logical_shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shifted to the right, with zeros from the left; count at least 1."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def signed(number: int | torch.Tensor) -> int | torch.Tensor:
    """The same 64 bits, as int64 reads them."""
    return number - (1 << 64) if isinstance(number, int) and number >> 63 else number
