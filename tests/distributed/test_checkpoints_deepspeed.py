"""A DeepSpeed run goes on with other numbers of ranks and under other stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from trustratio.integrations.checkpoints.deepspeed_engine import load_engine_state, save_engine_state
from trustratio.optimizers import LAMB

from .checkpoint_runs import Files, assert_continued, make_case, read
from .pool import WorkerPool

RUNS = (("lamb", 1), ("lars", 2), ("novograd", 3), ("vrlamb", 3))


def on_three_ranks(files: Files, name: str, stage: int) -> str:
    """The file of a run of two steps on three ranks, from a file of four; those steps are exact."""
    path = files.get("engine", name, 4, stage)
    then = f"{path}-three"
    if not Path(then).exists():
        case = replace(make_case(name, 3, stage), steps=5)
        assert_continued(case, files.run(3, read, "engine", case, path, 3, 5, then))
    return then


@pytest.mark.parametrize(("name", "stage"), RUNS)
@pytest.mark.parametrize(("after", "world_size"), [(4, 3)])
def test_from_four_ranks_to_three(files: Files, name: str, stage: int, after: int, world_size: int) -> None:
    on_three_ranks(files, name, stage)


@pytest.mark.parametrize(("name", "stage"), RUNS)
@pytest.mark.parametrize(("after", "world_size"), [(3, 2)])
def test_and_on_to_two(files: Files, name: str, stage: int, after: int, world_size: int) -> None:
    path = on_three_ranks(files, name, stage)
    case = make_case(name, world_size, 3 if stage == 2 else stage)  # once with another stage, too
    assert_continued(case, files.run(world_size, read, "engine", case, path, 5), first=5)


def scheduled_engine() -> Any:
    model = torch.nn.Linear(5, 3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 10}},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=LAMB(model.parameters(), lr=0.5), config=config)[0]


def continued_schedule(path: str) -> tuple[list[Any], list[Any]]:
    """Learning rate, loss scale and counters of three steps after four, straight on and in a new engine."""
    seen = []
    engine = scheduled_engine()
    for part in range(2):
        values = []
        for _ in range(4 if part == 0 else 0):
            step_once(engine)
        if part == 0:
            save_engine_state(engine, path)
        else:
            load_engine_state(engine, path)
        for _ in range(3):
            step_once(engine)
            values.append((engine.get_lr(), engine.optimizer.loss_scale, engine.global_steps, engine.global_samples))
        seen.append(values)
        engine.destroy()
        engine = scheduled_engine() if part == 0 else engine
    return seen[0], seen[1]


def step_once(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, 5, dtype=torch.half)).float().sum())
    engine.step()


@pytest.mark.parametrize("world_size", [2])
def test_scheduler_loss_scale_and_counters_go_on(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    for straight, resumed in pool.run(continued_schedule, str(tmp_path / "state")):
        assert resumed == straight
        assert straight[0][0] != straight[2][0]  # the schedule moves
        assert straight[0][1] != straight[2][1]  # and so does the loss scale


def save_amid_an_accumulation(path: str) -> None:
    model = torch.nn.Linear(5, 3)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "steps_per_print": 10**9}
    engine = deepspeed.initialize(model=model, optimizer=LAMB(model.parameters()), config=config)[0]
    engine.backward(engine(torch.ones(1, 5)).sum())
    engine.step()
    save_engine_state(engine, path)


@pytest.mark.parametrize("world_size", [2])
def test_saving_amid_an_accumulation_is_refused(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    with pytest.raises(AssertionError, match="1 of 2 micro-batches are accumulated"):
        pool.run(save_amid_an_accumulation, str(tmp_path / "state"))
