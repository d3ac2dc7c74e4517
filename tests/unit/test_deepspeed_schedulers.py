"""DeepSpeed's own schedulers write over rates and betas: refused at the first step where they are not those given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR

from trustratio.integrations.accelerate import ConflictingSettingsError
from trustratio.optimizers import LAMB, LARS, LayerwiseOptimizer


def lamb(*rates: float, **options: Any) -> LAMB:
    groups = []
    for rate in rates:
        weight = torch.nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.ones(3, 2)
        groups.append({"params": [weight], **({"lr": rate} if len(rates) > 1 else {})})
    return LAMB(groups, lr=rates[0], **options)


CYCLE = {"cycle_min_lr": 0.001, "cycle_first_step_size": 4}
DECAY = {"total_num_steps": 10, "warmup_num_steps": 2}

REFUSED: list[Any] = [
    (WarmupLR, {"warmup_max_lr": 0.001}, lambda: lamb(0.05), 'WarmupLR, .* a peak of 0.001.*"warmup_max_lr": 0.05'),
    (WarmupDecayLR, {**DECAY, "warmup_max_lr": 5e-5}, lambda: lamb(0.05), "WarmupDecayLR, .* a peak of 5e-05"),
    # Its own default is 0.001.
    (WarmupDecayLR, DECAY, lambda: lamb(0.05), "a peak of 0.001"),
    (OneCycle, {**CYCLE, "cycle_max_lr": 0.01, "cycle_momentum": False}, lambda: lamb(0.05), '"cycle_max_lr": 0.05'),
    # DeepSpeed writes the second beta too: 0.99 for everybody.
    (OneCycle, {**CYCLE, "cycle_max_lr": 0.05}, lambda: lamb(0.05), r'betas=\(0.9, 0.999\).* "cycle_momentum": false'),
    # One rate for all groups where each was given its own.
    (WarmupLR, {"warmup_max_lr": 0.05}, lambda: lamb(0.05, 0.01), r'"warmup_max_lr": \[0.05, 0.01\]'),
    (WarmupLR, {"warmup_max_lr": 0.001}, lambda: copy.deepcopy(lamb(0.05)), "lr=0.05"),
    (WarmupLR, {"warmup_max_lr": 0.001}, lambda: lamb(torch.tensor(0.05)), "lr=0.05"),
]

ACCEPTED: list[Any] = [
    (WarmupLR, {"warmup_max_lr": 0.05}, lambda: lamb(0.05)),
    (WarmupLR, {}, lambda: lamb(0.05, 0.01)),
    (WarmupLR, {"warmup_max_lr": [0.05, 0.01]}, lambda: lamb(0.05, 0.01)),
    (WarmupDecayLR, {**DECAY, "warmup_max_lr": 0.05}, lambda: lamb(0.05)),
    (WarmupCosineLR, {"total_num_steps": 10}, lambda: lamb(0.05)),
    (LRRangeTest, {}, lambda: lamb(0.05)),
    (OneCycle, {**CYCLE, "cycle_max_lr": 0.05, "cycle_momentum": False}, lambda: lamb(0.05)),
    (OneCycle, {**CYCLE, "cycle_max_lr": 0.05}, lambda: lamb(0.05, betas=(0.9, 0.99))),
]


@pytest.mark.parametrize(("scheduler_class", "options", "make", "message"), REFUSED)
def test_other_rates_and_betas_are_refused(
    scheduler_class: Any, options: dict[str, Any], make: Callable[[], LayerwiseOptimizer], message: str
) -> None:
    optimizer = make()
    scheduler = scheduler_class(optimizer, **options)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones(3, 2)
    for _ in range(2):
        with pytest.raises(ConflictingSettingsError, match=message):
            optimizer.step()
        scheduler.step()
    assert all(bool((p == 1).all()) for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize(("scheduler_class", "options", "make"), ACCEPTED)
def test_what_agrees_trains(
    scheduler_class: Any, options: dict[str, Any], make: Callable[[], LayerwiseOptimizer]
) -> None:
    optimizer = make()
    scheduler = scheduler_class(optimizer, **options)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert any(bool((p != 1).any()) for group in optimizer.param_groups for p in group["params"])


def test_schedulers_of_other_optimizers_do_not_count() -> None:
    other, optimizer = lamb(0.05), LARS([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    elsewhere = WarmupLR(other, warmup_max_lr=0.001)
    for group in optimizer.param_groups:
        group["lr"] = 0.01  # by hand, which is the user's own
        group["params"][0].grad = torch.ones(2, 2)
    optimizer.step()
    assert elsewhere.optimizer is other
