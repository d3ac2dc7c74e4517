"""DeepSpeed's own schedulers, which write rates and betas of their own over those that the optimizer was given.

    section "scheduler"                  what it takes the peak rate from
    WarmupLR, WarmupDecayLR              "warmup_max_lr"; WarmupLR without it: the groups' rates
    OneCycle                             "cycle_max_lr"; and it writes its own betas, with "cycle_momentum"
    WarmupCosineLR                       the groups' rates
    LRRangeTest                          a test of rates has no peak

Under the Hugging Face Trainer "auto" stands for `TrainingArguments.learning_rate`. Read from DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deepspeed.runtime.lr_schedules import OneCycle, WarmupLR

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.living import living

from .replaced import ConflictingSettingsError

__all__ = ["refuse_other_rates"]

PEAKS = {WarmupLR: "warmup_max_lr", OneCycle: "cycle_max_lr"}


def refuse_other_rates(optimizer: Any) -> None:
    """Raise if one of DeepSpeed's schedulers drives the optimizer to other rates or betas than it was given.

    Raises:
        ConflictingSettingsError: If so, with both, and what to write.
    """
    if not isinstance(optimizer, LayerwiseOptimizer):
        return
    for scheduler in living(*PEAKS):
        if vars(scheduler).get("optimizer") is optimizer and _is_constructed(scheduler):
            _refuse_peak(optimizer, scheduler)
            if isinstance(scheduler, OneCycle) and scheduler.cycle_momentum:
                _refuse_betas(optimizer, scheduler)


def _is_constructed(scheduler: Any) -> bool:
    """Whether it has all its numbers. A traceback that is kept keeps alive what failed on the way."""
    return hasattr(scheduler, "last_batch_iteration")


def _refuse_peak(optimizer: LayerwiseOptimizer, scheduler: Any) -> None:
    given = [float(options["lr"]) for options in optimizer.given_options]
    peaks = [float(peak) for peak in scheduler.max_lrs]
    if _agree(peaks, given):
        return
    key = next(key for kind, key in PEAKS.items() if isinstance(scheduler, kind))
    raise ConflictingSettingsError(
        f'{type(optimizer).__name__} was given lr={_listed(given)}, and the section "scheduler" of the DeepSpeed '
        f"config, {type(scheduler).__name__}, would train it with a peak of {_listed(peaks)}. Remove the section, or "
        f'write "{key}": {_listed(given)} in it. The Trainer puts TrainingArguments.learning_rate in place of "auto": '
        "give that the same value"
    )


def _refuse_betas(optimizer: LayerwiseOptimizer, scheduler: OneCycle) -> None:
    given = [tuple(options["betas"]) for options in optimizer.given_options if "betas" in options]
    cycled = [tuple(betas) for betas in scheduler.max_moms]
    if not given or all(betas in given for betas in cycled):
        return
    raise ConflictingSettingsError(
        f'{type(optimizer).__name__} was given betas={given[0]}, and the section "scheduler" of the DeepSpeed config, '
        f'OneCycle, would write its own over them, {cycled[0]} at most: write "cycle_momentum": false in that section'
    )


def _agree(peaks: Sequence[float], given: Sequence[float]) -> bool:
    # DeepSpeed splits the groups of models with experts: then a peak that any group was given will do.
    if len(peaks) == len(given):
        return all(map(_equal, peaks, given))
    return all(any(_equal(peak, rate) for rate in given) for peak in peaks)


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


def _listed(rates: Sequence[float]) -> str:
    distinct = set(rates)
    return f"{rates[0]:g}" if len(distinct) == 1 else str([float(f"{rate:g}") for rate in rates])
