"""DeepSpeed's own checkpoints where state would get lost or to another layer: refused, on all ranks, before a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from trustratio.optimizers import LAMB
from trustratio.optimizers.sharding.layout import LayoutError

from .pool import WorkerPool


def make_engine(stage: int, frozen: int | None = None, **config: Any) -> Any:
    """An engine for three layers, two of the same size, whose parameters come without names."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=number == 2) for number in range(3)))
    if frozen is not None:
        model[frozen].weight.requires_grad_(False)
    optimizer = LAMB([p for p in model.parameters() if p.requires_grad], lr=0.1)
    zero = {"stage": stage, **config.pop("zero_optimization", {})}
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: int) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        engine.backward(engine(torch.randn(4, 6)).square().mean())
        engine.step()


def weights(engine: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def refusal(engine: Any) -> str:
    """What the first step says, which must not change the weights."""
    before = weights(engine)
    try:
        train(engine, 1)
    except LayoutError as error:
        assert torch.equal(weights(engine), before)
        return str(error)
    finally:
        engine.destroy()
    return "no refusal"


def lose_a_step(_: Any, state_dict: dict[str, Any]) -> None:
    for state in state_dict["state"].values():
        state["layers"]["step"][-1] = 0


def continue_wrongly(folder: str) -> dict[str, str]:
    engine = make_engine(1, frozen=0)
    train(engine, 3)
    engine.save_checkpoint(folder, "tag")
    straight = weights(engine)
    engine.destroy()

    others = make_engine(1, frozen=1)
    others.load_checkpoint(folder, "tag")
    stepless = make_engine(1, frozen=0)
    stepless.basic_optimizer.register_load_state_dict_pre_hook(lose_a_step)
    stepless.load_checkpoint(folder, "tag")
    anew = make_engine(1, frozen=0)
    anew.load_checkpoint(folder, "tag")
    for state in anew.basic_optimizer.state.values():
        state["layers"]["step"].zero_()
    train(anew, 1)  # to count anew is the program's own wish
    anew.destroy()
    same = make_engine(1, frozen=0)
    same.load_checkpoint(folder, "tag")
    assert torch.equal(weights(same), straight)
    train(same, 1)
    same.destroy()
    return {"others": refusal(others), "stepless": refusal(stepless)}


@pytest.mark.parametrize("world_size", [2])
def test_state_of_other_layers_and_without_steps(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    for answer in pool.run(continue_wrongly, str(tmp_path)):
        assert "1.weight (6, 6) in the state is 0.weight (6, 6) here. Freeze and thaw the same ones" in answer["others"]
        assert "has step 0, and moments that are not zero, of 2.bias: its steps were lost" in answer["stepless"]


def with_switch(stage: int, config: dict[str, Any]) -> str:
    return refusal(make_engine(stage, **config))


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        (1, {"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint keeps no state per layer"),
        (2, {"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint keeps no state per layer"),
        (1, {"checkpoint": {"load_universal": True}}, "checkpoint.load_universal reads no state per layer"),
        (3, {"checkpoint": {"load_universal": True}}, "checkpoint.load_universal reads no state per layer"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_switches(pool: WorkerPool, stage: int, config: dict[str, Any], message: str, world_size: int) -> None:
    for answer in pool.run(with_switch, stage, config):
        assert message in answer
        assert "Remove the entry; save_engine_state and load_engine_state" in answer


def weights_alone(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two steps from loaded weights without their state; and the same steps of an optimizer that never had another."""
    engine = make_engine(2)
    train(engine, 2)
    engine.save_checkpoint(folder, "tag")
    saved = engine.module.state_dict()
    engine.destroy()
    results = []
    for load in (True, False):
        engine = make_engine(2)
        if load:
            engine.load_checkpoint(folder, "tag", load_optimizer_states=False)
        else:
            engine.module.load_state_dict(saved)
            engine.optimizer.refresh_fp32_params()
        train(engine, 2)
        results.append(weights(engine))
        engine.destroy()
    return results[0], results[1]


@pytest.mark.parametrize("world_size", [2])
def test_weights_without_state_start_anew(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    for loaded, fresh in pool.run(weights_alone, str(tmp_path)):
        assert torch.equal(loaded, fresh)
