"""Times of several contenders for the same work: taken in turn, quoted as medians and ratios.

Machines are noisy and change their speed while they run. Every round runs each contender once, each round in another
order, since one leaves caches and threads behind for the next. Two contenders' times are compared within each round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Timing", "alternate", "quartiles", "synchronize"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one entry per round, and those of the baseline in the same rounds."""

    seconds: list[float]
    baseline: list[float]

    def summary(self) -> dict[str, Any]:
        """Median and quartiles in milliseconds, and of the ratio to the baseline, round by round; and every round."""
        ratios = [own / other for own, other in zip(self.seconds, self.baseline, strict=True)]
        low, middle, high = quartiles([1e3 * value for value in self.seconds])
        ratio_low, ratio, ratio_high = quartiles(ratios)
        return {
            "milliseconds": middle,
            "milliseconds_low": low,
            "milliseconds_high": high,
            "ratio": ratio,
            "ratio_low": ratio_low,
            "ratio_high": ratio_high,
            "rounds": len(self.seconds),
            "each": [round(1e3 * value, 4) for value in self.seconds],
        }


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    warmup: int = 2,
    prepare: Callable[[str], object] = lambda name: None,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Run every contender once per round.

    Args:
        contenders: What to time, by name.
        baseline: Name of the one that the others are compared with.
        rounds: Rounds that count.
        warmup: Rounds that do not, first: state and plans are made in them.
        prepare: Called with a contender's name before its turn; its time does not count.
        clock: Runs a contender and returns its seconds; by default those until the accelerator has finished.

    Returns:
        One `Timing` per contender.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in random.Random(number).sample(names, len(names)):
            prepare(name)
            begin_together()
            taken = (clock or until_finished)(contenders[name])
            if number >= 0:
                seconds[name].append(taken)
    return {name: Timing(values, seconds[baseline]) for name, values in seconds.items()}


def until_finished(work: Callable[[], object]) -> float:
    """Seconds until the work is done, on the accelerator too."""
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def begin_together() -> None:
    """Wait for the accelerator and for the other ranks, lest their delays count as this contender's time."""
    synchronize()
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
