"""Layer norms by the Trainer and accelerate: those that are logged are those of whole layers, whatever is sharded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from .pool import WorkerPool
from .shown_norms_runs import SETTINGS, begin, log_with_accelerate, show

BOUND = 2e-6

with_any_optimizer = pytest.mark.parametrize(
    ("setting", "optimizer"),
    [
        *((setting, "adamw") for setting in SETTINGS),
        *(("ddp", name) for name in ("adafactor", "sgd", "lamb")),
        *(("zero-2", "lamb"), ("zero-2", "sgd")),
    ],
)


def norms_of(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """‖w‖ and ‖Δw‖ of each layer and of the model, in float64."""
    found = {name: (w.norm().item(), (after[name] - w).norm().item()) for name, w in before.items()}
    together = (sum(norm[i] ** 2 for norm in found.values()) ** 0.5 for i in (0, 1))
    return {**found, "model": tuple(together)}  # type: ignore[dict-item]


@pytest.mark.parametrize("world_size", [2])
@with_any_optimizer
def test_the_trainer_logs_norms_of_whole_layers(
    pool: WorkerPool, setting: str, optimizer: str, world_size: int, tmp_path: Path
) -> None:
    shown = {"every": 2, "layers": "*dense.weight", "numbers": ("weight", "update", "gradient")}
    answers = pool.run(show, setting, optimizer, str(tmp_path), 3, callback=shown, logging_steps=3)
    elements = sum(w.numel() for w in answers[0]["weights"][0].values())
    assert (answers[0]["elements"] < elements) == (setting != "ddp")  # it is sharded
    records = answers[0]["records"]
    assert [record["step"] for record in records] == [2, 3]
    for record in records:
        expected = norms_of(*answers[0]["weights"][record["step"] - 1 : record["step"] + 1])
        found = {**record["layers"], "model": record["model"]}
        assert set(found) == set(expected)
        for name, (weight, update) in expected.items():
            assert found[name]["weight"] == pytest.approx(weight, rel=BOUND), name
            assert found[name]["update"] == pytest.approx(update, rel=BOUND), name
    for answer in answers:  # alike on all ranks
        [logged] = [entry for entry in answer["log"] if "layer_norms/model/ratio" in entry]
        [losses] = [entry for entry in answer["log"] if "loss" in entry]
        assert logged["step"] == losses["step"] == 3
        of_layers = {key for key in logged if key.startswith("layer_norms/") and "/model/" not in key}
        dense = [name for name in records[1]["layers"] if name.endswith("dense.weight")]
        assert of_layers == {f"layer_norms/{number}/{name}" for number in shown["numbers"] for name in dense}
        for name in dense:
            assert logged[f"layer_norms/update/{name}"] == records[1]["layers"][name]["update"]


@pytest.mark.parametrize("world_size", [2])
def test_sharded_gradients_are_those_of_ddp(pool: WorkerPool, world_size: int, tmp_path: Path) -> None:
    """In the first step, from the same weights: of each rank's part they would be smaller by about √ranks."""
    of_settings = {}
    for setting in ("ddp", "zero-3", "fsdp2"):
        folder = tmp_path / setting
        folder.mkdir()
        of_settings[setting] = pool.run(show, setting, "sgd", str(folder), 1)[0]["records"][0]
    plain = of_settings.pop("ddp")
    for record in of_settings.values():
        for name, layer in plain["layers"].items():
            if not name.endswith("key.bias"):  # which softmax does not see
                assert record["layers"][name]["gradient"] == pytest.approx(layer["gradient"], rel=1e-4), name
        assert record["model"]["gradient"] == pytest.approx(plain["model"]["gradient"], rel=1e-5)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("setting", ["ddp", "zero-2"])
def test_a_file_goes_on_from_a_checkpoint(pool: WorkerPool, setting: str, world_size: int, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "callback": {"every": 1}}
    pool.run(show, setting, "adamw", str(tmp_path), 3, **saving)
    shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
    answers = pool.run(show, setting, "adamw", str(tmp_path), 3, True, **saving)
    assert [record["step"] for record in answers[0]["records"]] == [1, 2, 3]
    before, after = answers[0]["weights"]
    found = answers[0]["records"][2]["layers"]
    for name, (weight, update) in norms_of(before, after).items():
        if name != "model":
            assert found[name]["weight"] == pytest.approx(weight, rel=BOUND)
            assert found[name]["update"] == pytest.approx(update, rel=BOUND)


@pytest.mark.parametrize("world_size", [2])
def test_a_file_that_cannot_be_written_is_refused_on_all_ranks(
    pool: WorkerPool, world_size: int, tmp_path: Path
) -> None:
    for answer in pool.run(begin, str(tmp_path)):
        assert answer.startswith(f"layer norms cannot go to the file '{tmp_path}/norms.jsonl': ")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", ["ddp", 1, 3])
def test_accelerate_logs_them(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    first, *others = pool.run(log_with_accelerate, stage)
    assert [other["logged"] for other in others] == [[]] * (world_size - 1)
    assert [step for step, _ in first["logged"]] == [2, 4]
    for step, values in first["logged"]:
        expected = norms_of(*first["weights"][step - 1 : step + 1])
        for name in ("0.weight", "2.weight"):
            assert values[f"layer_norms/update/{name}"] == pytest.approx(expected[name][1], rel=BOUND)
        assert len(values) == 13 + 2
        assert values["layer_norms/model/weight"] == pytest.approx(expected["model"][0], rel=BOUND)
