"""How much of the time each part gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SHARES", "Share", "limit_of"]


@dataclass(frozen=True)
class Share:
    """A part's claim.

    Attributes:
        weight: Of what is left, beside the weights of the parts that come later.
        least: Seconds below which it would find out nothing and is skipped.
    """

    weight: float
    least: float


SHARES = {
    "machine": Share(40, 20),  # whose torch is the first to be read from the disk
    "kernels": Share(140, 40),
    "speed": Share(90, 30),
    "sharded": Share(65, 30),
    "job": Share(60, 40),
    "throughput": Share(110, 50),  # the imports, then as much as the first case is given, with its compiling
    "batch64k": Share(80, 40),
}
"""Weights are about seconds of nine minutes. What an early part leaves goes to the later ones."""


def limit_of(names: Sequence[str], left: float, shares: Mapping[str, Share] = SHARES) -> float | None:
    """Seconds for the first of the parts that are still to run, of `left` for all; None if it is to be skipped."""
    share = shares[names[0]]
    if left < share.least:
        return None
    return max(share.least, left * share.weight / sum(shares[name].weight for name in names))
