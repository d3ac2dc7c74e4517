"""The Hugging Face Trainer with every optimizer, under DDP and DeepSpeed, against a plain loop in one process."""

from __future__ import annotations

from typing import Any

import pytest

from .pool import WorkerPool
from .test_accelerate import NAMES
from .trainer_runs import STEPS, dropped, train, train_plainly

STAGES: tuple[str | int, ...] = ("ddp", 0, 1, 2, 3)

# Of this model's gradients some elements hardly vary between groups, and VRSGD divides by the variance.
BOUNDS = {"vrsgd": 1e-3}


def worst_change(plain: dict[str, Any], answer: dict[str, Any]) -> float:
    """The largest error of a layer's change over the training, relative to that change.

    Softmax does not see the keys' biases: their gradient is rounding, which Adam makes as large as any.
    """
    errors = []
    for layer, start in plain["start"].items():
        if layer.endswith("key.bias"):
            continue
        change, wanted = answer["weights"][layer] - start, plain["weights"][layer] - start
        errors.append(((change - wanted).norm() / wanted.norm().clamp(min=1e-6)).item())
    return max(errors)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_on_every_stage(pool: WorkerPool, name: str, world_size: int, tmp_path: Any) -> None:
    plain = pool.run(train_plainly, name, world_size)[0]
    for stage in STAGES:
        for answer in pool.run(train, name, stage, str(tmp_path)):
            assert worst_change(plain, answer) <= BOUNDS.get(name, 1e-4)
            assert answer["ratios"] == pytest.approx(plain["ratios"], rel=1e-4)
            assert sum("loss" in entry for entry in answer["log"]) == STEPS
            assert sum("trust_ratio/median" in entry for entry in answer["log"]) == STEPS


@pytest.mark.parametrize("world_size", [2])
def test_zero_init_and_noise(pool: WorkerPool, world_size: int, tmp_path: Any) -> None:
    """Under zero.Init parameters have no shape of their own: groups and names come out the same."""
    for answer in pool.run(train, "lamb", 3, str(tmp_path), True, True):
        assert answer["ratios"]["cls.predictions.transform.dense.weight"] != 1.0
        assert answer["ratios"]["cls.predictions.bias"] == 1.0
        logged = [entry for entry in answer["log"] if "gradient_noise/scale" in entry]
        assert len(logged) == STEPS
        assert all(entry["gradient_noise/noise"] > 0 for entry in logged)


@pytest.mark.parametrize("world_size", [2])
def test_dropped_optimizers_are_refused(pool: WorkerPool, world_size: int, tmp_path: Any) -> None:
    for answer in pool.run(dropped, str(tmp_path), 1, "optimizers"):
        assert answer.startswith("ReplacedOptimizerError: the Trainer was given LAMB but would train with Adam"), answer
        assert 'optimizer_cls_and_kwargs=optimizer_for_trainer("lamb"' in answer
    for answer in pool.run(dropped, str(tmp_path), 2, "offload"):
        assert answer.startswith("ReplacedOptimizerError: DeepSpeedCPUAdam"), answer
    for answer in pool.run(dropped, str(tmp_path), 1, "config"):
        assert answer.startswith("ReplacedOptimizerError: Adam"), answer
    assert pool.run(dropped, str(tmp_path), "ddp", "optimizers") == ["LAMB", "LAMB"]
