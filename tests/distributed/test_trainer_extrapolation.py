"""The Trainer with ExtrapolationCallback, under DDP and DeepSpeed, against a plain loop in one process."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from trustratio.integrations.extrapolation import ExtrapolationCallback
from trustratio.integrations.transformers import masked_language_modeling_loss, optimizer_for_trainer
from trustratio.optimizers import LAMB, Extrapolation

from .cases import gathered
from .pool import WorkerPool
from .trainer_runs import ACCUMULATION, MICRO, STEPS, _model, arguments, rows

OPTIONS = {"lr": 0.05, "weight_decay": 0.1}
STEP_SIZE = {"gradient": 0.5, "own_gradient": 0.5, "noise": 0.2}
SAVED = 2


def train(folder: str, stage: str | int, direction: str, resume: bool = False, **options: Any) -> dict[str, Any]:
    """The weights after training, and how many forwards were extrapolated."""
    model = _model()
    saving = {"save_strategy": "steps", "save_steps": SAVED, "eval_strategy": "steps", "eval_steps": SAVED}
    trainer = Trainer(
        model=model,
        args=arguments(folder, stage, **saving),
        train_dataset=rows(),  # type: ignore[arg-type]
        eval_dataset=rows()[:4],  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=optimizer_for_trainer("lamb", **OPTIONS),
        compute_loss_func=masked_language_modeling_loss,
    )
    callback = ExtrapolationCallback(STEP_SIZE[direction], direction, **options)
    trainer.add_callback(callback)
    moved: dict[bool, list[bool]] = {True: [], False: []}  # in training, in evaluation
    model.register_forward_pre_hook(
        lambda *_: moved[model.training].append(getattr(callback.extrapolation, "is_moved", False))
    )
    with contextlib.redirect_stdout(None):
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED}" if resume else None)
    weights = {}
    for layer, parameter in model.named_parameters():
        with gathered([parameter]):
            weights[layer] = parameter.detach().clone()
    getattr(trainer.model_wrapped, "destroy", lambda: None)()
    return {"weights": weights, "moved": moved}


def train_plainly(direction: str, ranks: int) -> dict[str, Any]:
    """The same in one process."""
    model = _model()
    start = {layer: p.detach().clone() for layer, p in model.named_parameters()}
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [item for item in named if item[1].dim() > 1]},
        {"params": [item for item in named if item[1].dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = LAMB(groups, **OPTIONS)
    extrapolation = Extrapolation(optimizer, STEP_SIZE[direction], direction)
    of_step = ACCUMULATION * MICRO * ranks
    for step in range(STEPS):
        batch = rows()[step * of_step : (step + 1) * of_step]
        ids, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
        with extrapolation:
            F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"start": start, "weights": {layer: p.detach().clone() for layer, p in model.named_parameters()}}


def worst_change(plain: dict[str, Any], weights: dict[str, torch.Tensor]) -> float:
    """As in `test_trainer`."""
    errors = [
        ((weights[layer] - plain["weights"][layer]).norm() / (plain["weights"][layer] - start).norm()).item()
        for layer, start in plain["start"].items()
        if not layer.endswith("key.bias")
    ]
    return max(errors)


@pytest.mark.parametrize(
    ("direction", "stage"), [*(("gradient", stage) for stage in ("ddp", 1, 2, 3)), ("noise", "ddp"), ("noise", 3)]
)
@pytest.mark.parametrize("world_size", [2])
def test_the_trainer_extrapolates_and_resumes(
    pool: WorkerPool, direction: str, stage: str | int, world_size: int, tmp_path: Any
) -> None:
    plain = pool.run(train_plainly, direction, world_size)[0]
    without = pool.run(train_plainly, "gradient" if direction == "noise" else "noise", world_size)[0]
    straight = pool.run(train, str(tmp_path), stage, direction)
    for answer in straight:
        assert worst_change(plain, answer["weights"]) <= 1e-4
        assert worst_change(without, answer["weights"]) > 1e-2
        first = ACCUMULATION if direction == "gradient" else 0
        assert answer["moved"][True] == [index >= first for index in range(STEPS * ACCUMULATION)]
        assert answer["moved"][False]
        assert not any(answer["moved"][False])
    for answer, resumed in zip(straight, pool.run(train, str(tmp_path), stage, direction, True), strict=True):
        assert all(torch.equal(resumed["weights"][layer], w) for layer, w in answer["weights"].items())


@pytest.mark.parametrize("world_size", [2])
def test_it_ends_after_its_last_step(pool: WorkerPool, world_size: int, tmp_path: Any) -> None:
    for answer in pool.run(train, str(tmp_path), "ddp", "noise", last_step=1):
        assert answer["moved"][True] == [index < ACCUMULATION for index in range(STEPS * ACCUMULATION)]


@pytest.mark.parametrize(("options", "message"), [({"step_size": -1}, "step_size"), ({"last_step": 0.5}, "last_step")])
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtrapolationCallback(**{"step_size": 0.1, **options})
