"""Groups of TrustRatio under sharding: those that a constructor sorts, and steps that come in several calls."""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import TrustRatio

from ..unit import test_trust_ratio_bases
from .pool import WorkerPool

LR = 0.05


class SlowerVectors(torch.optim.AdamW):
    """Gives vectors a rate of their own, and no decay."""

    def __init__(self, params: Any, lr: float = 1e-3):
        members = list(params)
        matrices, vectors = ([p for p in members if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
        super().__init__([{"params": matrices}, {"params": vectors, "lr": lr / 4, "weight_decay": 0.0}], lr=lr)


def make(model: torch.nn.Module, *, by_hand: bool) -> TrustRatio:
    named = list(model.named_parameters())
    if not by_hand:
        return TrustRatio(SlowerVectors, named, lr=LR, adapt=True)
    groups = [
        {"params": [pair for pair in named if pair[1].ndim > 1]},
        {"params": [pair for pair in named if pair[1].ndim == 1], "lr": LR / 4, "weight_decay": 0.0},
    ]
    return TrustRatio(torch.optim.AdamW, groups, lr=LR, adapt=True)


def ratios_under(wrapper: str, by_hand: bool = False) -> list[dict[str, float]]:
    """The ratios of five steps, each of which depends on the weights after those before."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    if wrapper == "fsdp":
        fully_shard(model)
    optimizer = make(model, by_hand=by_hand)
    trained, engine = model, None
    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
    elif wrapper.isdigit():
        stage = {"zero_optimization": {"stage": int(wrapper)}, "gradient_clipping": 0.0}
        config = {"train_micro_batch_size_per_gpu": 4, **stage}
        trained = engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    ratios = []
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = (trained(x) - 1).square().sum()
        (loss.backward if engine is None else lambda loss=loss: engine.backward(loss))()
        (optimizer if engine is None else engine).step()
        ratios.append(optimizer.trust_ratios())
        if engine is None:
            optimizer.zero_grad()
    if engine is not None:
        engine.destroy()
    return ratios


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("wrapper", ["ddp", "1", "3", "fsdp"])
def test_the_bases_groups_are_those_that_are_sharded(pool: WorkerPool, wrapper: str, world_size: int) -> None:
    wanted = pool.run(ratios_under, "ddp", True)[0]
    for found in pool.run(ratios_under, wrapper):
        for step, expected in zip(found, wanted, strict=True):
            assert step == pytest.approx(expected, rel=1e-5)


# Steps of several calls ----------------------------------------------------------------------------------------------


def trained(
    model: Any, optimizer: Any, zero: dict[str, Any] | None, inputs: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights after a step for each of the inputs, under DeepSpeed if there are options of ZeRO."""
    engine, named = None, dict(model.named_parameters())
    if zero is not None:
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "gradient_clipping": 0.0}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for x in inputs:
        loss = ((engine or model)(x) - 1).square().sum()
        (loss.backward if engine is None else partial(engine.backward, loss))()
        (engine or optimizer).step()
        if engine is None:
            model.zero_grad()
    if engine is None:
        return {name: p.detach().clone() for name, p in named.items()}
    with deepspeed.zero.GatheredParameters([*named.values()], enabled=(zero or {}).get("stage") == 3):
        weights = {name: p.detach().clone() for name, p in named.items()}
    engine.destroy()
    return weights


def numbers(step: int, columns: int) -> torch.Tensor:
    return torch.randn(2, columns, generator=torch.Generator().manual_seed(step))


def weights_after_steps(base_name: str, zero: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """What some steps make of a model of two groups, each of several layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.05}]
    optimizer = TrustRatio(getattr(test_trust_ratio_bases, base_name), groups, lr=0.1)
    return trained(model, optimizer, zero, [numbers(step, 4) for step in range(4)])


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("base", ["CountsInGroup", "CountsInState"])
def test_steps_are_counted_once_whatever_the_calls(pool: WorkerPool, base: str, world_size: int) -> None:
    """ZeRO-1 steps one group after the other, ZeRO-3 one sub-group, and leaves the other groups empty."""
    wanted, _ = pool.run(weights_after_steps, base, None)
    for zero in ({"stage": 1}, {"stage": 3, "sub_group_size": 10}):
        for weights in pool.run(weights_after_steps, base, zero):
            for name, value in wanted.items():
                torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def weights_of_low_ranks(zero: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """What some steps of AdamW make of two low-rank matrices in groups of their own; the second begins at zero."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 6, bias=False))
    torch.nn.init.zeros_(model[1].weight)
    first, second = model.named_parameters()
    groups = [{"params": [first]}, {"params": [second], "lr": 0.04}]
    optimizer = TrustRatio(torch.optim.AdamW, groups, lr=0.01, adapt=False)
    return trained(model, optimizer, zero, [numbers(1, 6)] * 4)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_group_without_gradient_in_the_first_step_counts_it(pool: WorkerPool, stage: int, world_size: int) -> None:
    """ZeRO calls for it before the group that has one."""
    wanted, _ = pool.run(weights_of_low_ranks, None)
    for weights in pool.run(weights_of_low_ranks, {"stage": stage}):
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
