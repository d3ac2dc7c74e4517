"""The Trainer's callback of layer norms in one process: which steps are measured and logged, whatever the optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trustratio.integrations.layer_norms import LayerNorms
from trustratio.integrations.norms.scalars import NUMBERS
from trustratio.integrations.transformers import LayerNormsCallback

from .test_trainer import trained

transformers.logging.set_verbosity_error()


class Watched(LayerNormsCallback):
    """Notes the steps that are measured."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.measured: list[int] = []

    def _was_measured(self, norms: LayerNorms) -> None:
        super()._was_measured(norms)
        self.measured.append(norms.latest().step)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("logging", "arguments", "every", "measured", "written", "logged"),
    [
        ("steps", {"logging_steps": 3}, None, [3, 6], [3, 6], [3, 6]),
        ("steps", {"logging_steps": 3, "logging_first_step": True}, None, [1, 3, 6], [1, 3, 6], [1, 3, 6]),
        ("steps", {"logging_steps": 3}, 2, [2, 3, 4, 6], [2, 3, 4, 6], [3, 6]),
        ("steps", {"logging_steps": 0.5}, None, [4], [4], [4]),  # a share of all steps, of which there are 7
        ("epoch", {}, None, [1, 2, 3, 4, 5, 6, 7], [4, 7], [4, 7]),  # training ends within the second epoch
        ("epoch", {}, 3, [1, 2, 3, 4, 5, 6, 7], [3, 4, 6, 7], [4, 7]),
        ("no", {}, None, [], [], []),
        ("no", {}, 3, [3, 6], [3, 6], []),
    ],
)
def test_which_steps_are_measured_written_and_logged(
    logging: str,
    arguments: dict[str, Any],
    every: int | None,
    measured: list[int],
    written: list[int],
    logged: list[int],
    tmp_path: Path,
) -> None:
    callback = Watched(every=every, file=tmp_path / "norms.jsonl")
    options = {"steps": 7, "accumulation": 2, "logging": logging, "arguments": arguments}
    trainer = trained(tmp_path, callback=lambda trainer: callback, **options)
    assert callback.measured == measured
    assert steps_in(tmp_path / "norms.jsonl") == written
    of_norms = [(step, logs) for step, logs in trainer.recorder.logs if "layer_norms/model/ratio" in logs]
    assert [step for step, _ in of_norms] == logged
    assert [step for step, logs in trainer.recorder.logs if "loss" in logs] == logged  # as without the callback
    for _, logs in of_norms:
        assert {key for key in logs if "layer_norms" in key} == {f"layer_norms/model/{number}" for number in NUMBERS}


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop"])
def test_any_optimizer(optim: str, tmp_path: Path) -> None:
    before: dict[str, torch.Tensor] = {}

    class Before(LayerNormsCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before.update({name: p.detach().double() for name, p in kwargs["model"].named_parameters()})

    options = {"arguments": {"optim": optim, "learning_rate": 0.01}, "optimizer_cls_and_kwargs": None}
    callback = Before(layers="*", numbers=("weight", "update"), every=1)
    trainer = trained(tmp_path, steps=2, callback=lambda trainer: callback, **options)
    logged = [logs for _, logs in trainer.recorder.logs if "layer_norms/model/ratio" in logs][-1]
    for name, parameter in trainer.model.named_parameters():
        assert logged[f"layer_norms/weight/{name}"] == pytest.approx(before[name].norm().item(), rel=2e-6)
        moved = (parameter.detach().double() - before[name]).norm().item()
        assert logged[f"layer_norms/update/{name}"] == pytest.approx(moved, rel=2e-6)


def test_a_training_that_was_broken_off_is_measured_no_more(tmp_path: Path) -> None:
    class Breaking(Watched):
        breaks = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if self.breaks and state.global_step == 2:
                raise KeyboardInterrupt

    callback, trainers = Breaking(file=tmp_path / "norms.jsonl"), []
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, steps=3, callback=lambda trainer: trainers.append(trainer) or callback)
    callback.breaks = False
    trainers[0].train()
    assert callback.measured == [1, 2, 1, 2, 3]
    assert steps_in(tmp_path / "norms.jsonl") == [1, 2, 3]
    assert steps_in(tmp_path / "norms.jsonl.old") == [1, 2]


def test_refusals(tmp_path: Path) -> None:
    for wrong, error, said in (
        ({"trainer": torch.nn.Linear(1, 1)}, TypeError, "takes a Trainer or nothing, and was given Linear"),
        ({"every": 0}, ValueError, "every must be an integer of at least 1, got 0"),
        ({"numbers": ["norm"]}, ValueError, "numbers has 'norm'; there are: weight"),
        ({"layers": [1]}, TypeError, "layers takes names or patterns"),
    ):
        with pytest.raises(error, match=said):
            LayerNormsCallback(**wrong)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"layer norms cannot go to the file .*: it is a folder: give the name of a file"
    ):
        trained(tmp_path, callback=lambda trainer: LayerNormsCallback(file=tmp_path))
