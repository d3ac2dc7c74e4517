"""The Hugging Face Trainer with every optimizer, under DDP and DeepSpeed, against a plain loop in one process."""

from __future__ import annotations

from typing import Any

import pytest

from trustratio.optimizers import OPTIMIZERS

from .accelerate_runs import counts_by_itself
from .pool import WorkerPool
from .trainer_runs import STEPS, dropped, grouped, train, train_plainly

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
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_on_every_stage(
    pool: WorkerPool, name: str, stage: str | int, world_size: int, tmp_path: Any
) -> None:
    plain = pool.run(train_plainly, name, world_size)[0]
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
def test_other_optimizers_rates_and_processes_are_refused(pool: WorkerPool, world_size: int, tmp_path: Any) -> None:
    """Before the first step, without any callback; each way of being given another run than was asked for."""
    beginnings = {
        "optimizers": "ReplacedOptimizerError: the Trainer was given LAMB but would train with Adam",
        "offload": "ReplacedOptimizerError: DeepSpeedCPUAdam",
        "optimizer section": "ReplacedOptimizerError: AdamW would train in place of the optimizer of optimizer_cls",
        "scheduler section": 'ConflictingSettingsError: LAMB was given lr=0.05, and the section "scheduler" of the D',
        "one process": "ConflictingSettingsError: accelerate counts 1 process, but 2 train",
        "accelerate's CPU": "ConflictingSettingsError: a DeepSpeed config was given, but accelerate trains without",
    }
    cures = {
        "optimizers": 'optimizer_cls_and_kwargs=optimizer_for_trainer("lamb"',
        "offload": '"zero_force_ds_cpu_optimizer": false',
        "optimizer section": "remove that section",
        "scheduler section": '"warmup_max_lr": 0.05',
        "one process": "TrainingArguments(use_cpu=True)",
        "accelerate's CPU": "ACCELERATE_USE_CPU=true",
    }
    if any(pool.run(counts_by_itself)):
        del beginnings["one process"]
    for way, beginning in beginnings.items():
        for answer in pool.run(dropped, str(tmp_path), 2 if way == "offload" else 1, way):
            assert answer.startswith(beginning), answer
            assert cures[way] in answer
    assert pool.run(dropped, str(tmp_path), "ddp", "optimizers") == ["LAMB", "LAMB"]


@pytest.mark.parametrize("world_size", [2])
def test_groups_follow_the_layers_own_shapes(pool: WorkerPool, world_size: int) -> None:
    """Whatever a wrapper has made of the parameters: FSDP1 leaves flat runs of them, zero.Init nothing."""
    plain = pool.run(grouped, "none")[0]
    assert plain["bert.embeddings.word_embeddings.weight"] == (0.1, True)
    assert plain["cls.predictions.transform.dense.weight"] == (0.1, False)
    assert plain["cls.predictions.bias"] == (0.0, False)
    for wrapper in ("fsdp1", "fsdp1, each layer", "fsdp1, no shard", "fsdp2", "zero.Init"):
        assert pool.run(grouped, wrapper) == [plain] * 2, wrapper
