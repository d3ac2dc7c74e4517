"""A run whose groups keep different state goes on from DeepSpeed's checkpoint: ZeRO steps one group at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from trustratio.optimizers import create_optimizer

from .pool import WorkerPool

DIFFERENT: dict[str, dict[str, Any]] = {
    "lars": {"momentum": 0.0},
    "adabelief": {"amsgrad": True},
    "fastadabelief": {"running_maximum": False},
}
"""An option of the second group, with which it keeps less or more than the first."""


def engine_of(name: str, stage: int) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), **DIFFERENT[name]}]
    options = {"rectify": False} if name == "adabelief" else {}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9}
    return deepspeed.initialize(
        model=model, optimizer=create_optimizer(name, groups, lr=0.1, **options), config=config
    )[0]


def weights_after(engine: Any, steps: int) -> list[torch.Tensor]:
    for step in range(steps):
        x = torch.linspace(-1, 1, 5).roll(step).unsqueeze(0)
        engine.backward(engine(x).square().sum())
        engine.step()
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def straight_on_and_resumed(name: str, stage: int, folder: str) -> bool:
    engine = engine_of(name, stage)
    weights_after(engine, 3)
    engine.save_checkpoint(folder)
    straight = weights_after(engine, 3)
    resumed = engine_of(name, stage)
    assert resumed.load_checkpoint(folder)[0] is not None
    return all(map(torch.equal, straight, weights_after(resumed, 3)))


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [2])
def test_groups_of_different_state_go_on(
    pool: WorkerPool, tmp_path: Path, name: str, stage: int, world_size: int
) -> None:
    assert pool.run(straight_on_and_resumed, name, stage, str(tmp_path)) == [True] * world_size
