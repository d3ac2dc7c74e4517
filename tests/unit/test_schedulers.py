"""Schedulers of torch that write rates, betas and momenta into the groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.optim import lr_scheduler

from trustratio.optimizers import OPTIMIZERS

from .test_torch_contract import class_of, has_momentum, same, train, values, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:.*group.* of samples per step.*")

SCHEDULES: list[Callable[[Any], Any]] = [
    lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
    lambda optimizer: lr_scheduler.ConstantLR(optimizer, total_iters=2),
    lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=3),
    lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
    lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 4),
    lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    lambda optimizer: lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.1, step_size_up=2, cycle_momentum=has_momentum(optimizer)
    ),
    lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8, cycle_momentum=has_momentum(optimizer)),
    lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]
    ),
    lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
]


@pytest.mark.parametrize("name", ["adamw", *OPTIMIZERS])
def test_every_scheduler(name: str) -> None:
    """Rates and momenta that a scheduler writes are those of the step, as if they had been given."""
    make = class_of(name)
    for make_schedule in SCHEDULES:
        layers, by_hand = weights(), weights()
        optimizer, other = make(layers.values(), lr=0.05), make(by_hand.values(), lr=0.05)
        schedule = make_schedule(optimizer)
        for step in range(5):
            wanted = {key: optimizer.param_groups[0].get(key) for key in ("lr", "betas", "momentum")}
            other.param_groups[0].update({key: value for key, value in wanted.items() if value is not None})
            train(optimizer, layers, step)
            train(other, by_hand, step)
            schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
        assert same(values(layers), values(by_hand)), type(schedule)
