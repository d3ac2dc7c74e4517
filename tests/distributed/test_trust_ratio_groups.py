"""TrustRatio around constructors that sort parameters into groups by themselves equals groups made by hand, sharded."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import TrustRatio

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
