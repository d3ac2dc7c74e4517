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


def weights_after_steps(base_name: str, wrapper: str) -> dict[str, torch.Tensor]:
    """What some steps make of a model of two groups, each of several layers."""
    base: Any = getattr(test_trust_ratio_bases, base_name)
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.05}]
    optimizer: Any = TrustRatio(base, groups, lr=0.1)
    engine = None
    if wrapper.isdigit():
        zero_options = {"stage": int(wrapper), **({"sub_group_size": 10} if wrapper == "3" else {})}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_options, "gradient_clipping": 0.0}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(4):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        loss = (engine or model)(x).square().sum()
        (loss.backward if engine is None else partial(engine.backward, loss))()
        (engine or optimizer).step()
        if engine is None:
            model.zero_grad()
    if engine is None:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=wrapper == "3"):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return weights


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("base", ["CountsInGroup", "CountsInState"])
def test_steps_are_counted_once_whatever_the_calls(pool: WorkerPool, base: str, world_size: int) -> None:
    """ZeRO-1 steps one group after the other, ZeRO-3 one sub-group, and leaves the other groups empty."""
    wanted, _ = pool.run(weights_after_steps, base, "none")
    for wrapper in ("1", "3"):
        for weights in pool.run(weights_after_steps, base, wrapper):
            for name, value in wanted.items():
                torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def change_of_low_ranks(stage: int | None) -> dict[str, torch.Tensor]:
    """What some steps of AdamW make of two low-rank matrices in groups of their own; the second begins at zero."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 6, bias=False))
    torch.nn.init.zeros_(model[1].weight)
    first, second = model.named_parameters()
    groups = [{"params": [first]}, {"params": [second], "lr": 0.04}]
    optimizer: Any = TrustRatio(torch.optim.AdamW, groups, lr=0.01, adapt=False)
    engine = None
    if stage is not None:
        zero_options = {"stage": stage}
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero_options, "gradient_clipping": 0.0}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        loss = ((engine or model)(x) - 1).square().sum()
        (loss.backward if engine is None else partial(engine.backward, loss))()
        (engine or optimizer).step()
        if engine is None:
            model.zero_grad()
    if engine is None:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    with deepspeed.zero.GatheredParameters([first[1], second[1]], enabled=stage == 3):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return weights


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_group_without_gradient_in_the_first_step_counts_it(pool: WorkerPool, stage: int, world_size: int) -> None:
    """ZeRO has made state by a step of zeros before."""
    wanted, _ = pool.run(change_of_low_ranks, None)
    for weights in pool.run(change_of_low_ranks, stage):
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
