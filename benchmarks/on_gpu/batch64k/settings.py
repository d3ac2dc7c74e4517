"""How large the runs are, at which rates, and how many updates there is time for."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LEAST_UPDATES", "OPTIMIZERS", "RATES", "REAL", "TOY", "Settings", "scaled_rate", "updates_that_fit"]

OPTIMIZERS = ("lamb", "lans", "adamw")
RATES = 3
LEAST_UPDATES = 10
"""Of a run; with less time there are fewer runs."""


@dataclass(frozen=True)
class Settings:
    """The real thing, or a toy for a rehearsal.

    Attributes:
        preset: of the recipe, for everything that is not here.
        overrides: of its model and data.
        batch: sequences of an update; the second batch is twice as large.
        micro_batch: sequences of a micro-batch at most, whatever the plan says: logits of more have over 2^31 elements.
        updates: of a run at most.
        backend: torch.compile's; the toy's is no compiler.
    """

    preset: str
    overrides: tuple[str, ...]
    batch: int
    micro_batch: int
    updates: int
    backend: str


REAL = Settings("lamb-tiny", (), 65_536, 32_768, 60, "inductor")
TOY = Settings(
    "lamb-tiny",
    ("model.layers=1", "model.hidden=32", "data.vocabulary=1000", "model.intermediate=64"),
    32,
    16,
    2,
    "aot_eager",
)


def updates_that_fit(seconds: float, update: float, most: int) -> int:
    """Updates per run so that all runs fit: one per optimizer and rate, and one per optimizer at the second batch.

    Those of the second batch are half as many and twice as long.

    Args:
        seconds: that there are.
        update: seconds of one.
        most: updates of a run.
    """
    runs = len(OPTIMIZERS) * (RATES + 1)
    fitting = int(seconds / (runs * update))
    return max(min(LEAST_UPDATES, most), min(most, fitting // 2 * 2))


def scaled_rate(rate: float) -> float:
    """A rate for twice the batch: times the square root of two, to three digits."""
    return float(f"{rate * math.sqrt(2):.3g}")
