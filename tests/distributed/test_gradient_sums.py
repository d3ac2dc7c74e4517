"""The error of an update's gradient that many micro-batches of 16-bit gradients are summed to, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

MICRO, ACCUMULATION, RANKS = 2, 128, 2
BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 8))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the same start in either precision
    return model


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (accumulation, ranks, micro, 32) with a mean, so that the gradients add up, and targets."""
    generator = torch.Generator().manual_seed(1)
    shape = (ACCUMULATION, RANKS, MICRO)
    return torch.randn(*shape, 32, generator=generator) + 0.5, torch.randn(*shape, 8, generator=generator)


def loss_of(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (model(inputs).float() - targets).square().sum() / (MICRO * ACCUMULATION * RANKS)


def summed(stage: int, settings: dict[str, Any]) -> torch.Tensor:
    """Return one update's gradient under the recipe's settings: what SGD at a rate of 1 moves the weights by."""
    from deepspeed.utils import safe_get_full_fp32_param

    from trustratio.recipes.rules.global_batch import BatchPlan
    from trustratio.recipes.rules.schedules import WarmupPolynomial
    from trustratio.recipes.training import deepspeed_settings
    from trustratio.recipes.training.engines import DeepSpeedTraining

    model = network()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    plan = BatchPlan(MICRO, ACCUMULATION, RANKS)
    complete = deepspeed_settings.merge(settings, plan, stage, "bf16", 0.0, True)
    engine = DeepSpeedTraining.initialize(
        model, torch.optim.SGD(model.parameters(), 1.0), lambda sgd: WarmupPolynomial(sgd, 0, 10), complete
    )
    engine.set_batch_plan(plan)
    inputs, targets = (values[:, engine.rank] for values in samples())
    for number in range(ACCUMULATION):
        engine.begin_micro_batch(last=number == ACCUMULATION - 1)
        engine.backward(loss_of(engine.engine, inputs[number].bfloat16(), targets[number]))
        engine.step()
    moved = []
    for before, parameter in zip(start, engine.engine.module.parameters(), strict=True):
        master = safe_get_full_fp32_param(parameter)
        moved.append((before - (parameter.detach().float() if master is None else master)).reshape(-1))
    engine.engine.destroy()
    return torch.cat(moved)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    model = network()
    inputs, targets = samples()
    loss_of(model, inputs.reshape(-1, 32), targets.reshape(-1, 8)).backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("world_size", [RANKS])
@pytest.mark.parametrize("settings", [{}, OFFLOAD], ids=["plain", "offload"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_many_micro_batches_are_summed_in_fp32(pool, world_size, exact, stage, settings):
    """As near as the rounding of the single gradients allows, which a sum in bf16 is far from."""
    error = (pool.run(summed, stage, settings)[0] - exact).norm() / exact.norm()
    assert error < 0.005


@pytest.mark.parametrize("world_size", [RANKS])
@pytest.mark.parametrize("stage", [2, 3])
def test_sums_in_bf16_are_as_inexact_as_the_warning_says(pool, world_size, exact, stage):
    error = (pool.run(summed, stage, BF16_SUMS)[0] - exact).norm() / exact.norm()
    assert error > 0.01
