"""Runs of the Trainer and of accelerate that keep numbers of 16 bits go on from their checkpoints to the bit."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers import BertForMaskedLM, Trainer

from trustratio.integrations.accelerate import layerwise_optimizer
from trustratio.integrations.checkpoints.consolidated import save_optimizer_state
from trustratio.integrations.transformers import (
    TrustRatioCallback,
    masked_language_modeling_loss,
    optimizer_for_trainer,
)

from .cases import Case, Model, deepspeed_config, initial_weights, make_optimizer, mean_gradients
from .pool import WorkerPool
from .sixteen_bit_runs import FP32, KEPT, SAVED, STEPS, assert_same, make_case
from .trainer_runs import arguments, config, rows

KINDS = [("ddp", "state"), ("ddp", "stochastic"), ("ddp", "kahan and state"), (2, "state"), (3, "state")]


def train_with_trainer(stage: Any, kept: str, folder: str, resumed: bool) -> list[str]:
    """All steps, or those that come after a checkpoint; writes what there is, and returns the layers with a ratio."""
    torch.manual_seed(int(resumed))
    model = BertForMaskedLM(config()).to(KEPT[kept].weights)
    options = {"lr": 0.01, "weight_decay": 0.1, "implementation": "eager", **KEPT[kept].options}
    trainer = Trainer(
        model=model,
        args=arguments(folder, stage, save_strategy="steps", save_steps=2),
        train_dataset=rows(),  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=optimizer_for_trainer("lamb", **options),
        compute_loss_func=masked_language_modeling_loss,
    )
    trainer.add_callback(TrustRatioCallback(trainer, per_layer=True))
    with contextlib.redirect_stdout(None):
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resumed else None)
    save_optimizer_state(trainer.optimizer, f"{folder}/{'resumed' if resumed else 'straight'}", model=model)
    logged = [entry for entry in trainer.state.log_history if any("trust_ratio" in key for key in entry)]
    if isinstance(stage, int):
        trainer.model_wrapped.destroy()  # type: ignore[operator]
    return sorted({key for entry in logged for key in entry if "trust_ratio" in key})


@pytest.mark.parametrize(("stage", "kept"), KINDS)
@pytest.mark.parametrize("world_size", [2])
def test_the_trainer_resumes(pool: WorkerPool, tmp_path: Path, stage: Any, kept: str, world_size: int) -> None:
    assert pool.run(train_with_trainer, stage, kept, str(tmp_path), False)[0]
    pool.run(train_with_trainer, stage, kept, str(tmp_path), True)
    assert_same(tmp_path / "resumed", tmp_path / "straight")


class Accelerated:
    """A model and its optimizer, prepared."""

    def __init__(self, case: Case, kept: str, seed: int):
        self.case = case
        self.model = Model(case).to(KEPT[kept].weights)
        self.model.load(initial_weights(replace(case, seed=seed)))
        plugin = None if case.stage == "ddp" else DeepSpeedPlugin(hf_ds_config=deepspeed_config(case))
        self.accelerator = Accelerator(cpu=plugin is None, deepspeed_plugin=plugin)
        self.trained, self.prepared = self.accelerator.prepare(self.model, make_optimizer(case, self.model))

    def train(self, first: int, last: int) -> None:
        for gradients in mean_gradients(self.case)[first:last]:
            self.accelerator.backward(self.trained(gradients))
            self.prepared.step()
            self.prepared.zero_grad()

    def close(self) -> None:
        if self.case.stage != "ddp":
            self.trained.destroy()
        del self.model, self.trained, self.prepared
        gc.collect()


def train_with_accelerate(case: Case, kept: str, folder: str, resumed: bool) -> None:
    run = Accelerated(case, kept, seed=int(resumed))
    if resumed:
        run.accelerator.load_state(f"{folder}/middle")
    else:
        run.train(0, SAVED)
        run.accelerator.save_state(f"{folder}/middle")
    run.train(SAVED, STEPS)
    path = f"{folder}/{'resumed' if resumed else 'straight'}"
    save_optimizer_state(layerwise_optimizer(run.prepared), path, model=run.model)
    run.close()


@pytest.mark.parametrize(("stage", "kept"), KINDS)
@pytest.mark.parametrize("world_size", [2])
def test_accelerate_resumes(pool: WorkerPool, tmp_path: Path, stage: Any, kept: str, world_size: int) -> None:
    case = make_case("lamb", stage, kept, config={} if stage == "ddp" else FP32)
    pool.run(train_with_accelerate, case, kept, str(tmp_path), False)
    pool.run(train_with_accelerate, case, kept, str(tmp_path), True)
    assert_same(tmp_path / "resumed", tmp_path / "straight")
