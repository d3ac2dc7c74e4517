"""Samples of the curvature in the workers that come to nothing, or lie beside checkpoints, schedulers and autocast."""

from __future__ import annotations

from contextlib import ExitStack, redirect_stdout
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.curvature_trainer import CurvatureTrainer
from trustratio.integrations.extrapolation import ExtrapolationCallback
from trustratio.integrations.transformers import optimizer_for_trainer
from trustratio.optimizers import CurvatureSGD, Extrapolation

from . import trainer_runs
from .cases import Case
from .curvature_runs import Loop, Sampled


def skip_a_batch(case: Case, folder: str) -> dict[str, Any]:
    """Save between wants_curvature() and curvature(), go on from there, and load where a sample is wanted."""
    loop = Loop(case, Sampled(scheduled=True))
    with loop.stack:
        loop.train(0, 1)
        rate, scheduler = loop.optimizer.param_groups[0]["lr"], loop.engine.lr_scheduler
        assert loop.optimizer.wants_curvature()
        told = loop.engine.lr_scheduler.get_last_lr()
        loop.engine.save_checkpoint(folder, tag="between")
        loop.backward(1)
        loop.second_pass(1)
        assert loop.engine.lr_scheduler is scheduler
        after = loop.optimizer.param_groups[0]["lr"], loop.engine.global_steps, scheduler.last_epoch
        loop.train(2, 3)
        assert loop.optimizer.wants_curvature()
        loop.engine.load_checkpoint(folder, tag="between")
        loaded = loop.optimizer.param_groups[0]["lr"], loop.engine.global_steps, scheduler.last_epoch
        assert loop.engine.lr_scheduler is scheduler
        return {"rate": rate, "told": told, "after": after, "loaded": loaded}


def lose_a_sample(case: Case, folder: str | None) -> dict[str, Any]:
    """A step goes without the sample that was due; saved after it, and gone on from there, or not."""
    loop = Loop(case, Sampled())
    with ExitStack() as stack:
        stack.callback(loop.stack.close)
        loop.train(0, 3)
        set_interval(loop, None)
        loop.backward(3)
        set_interval(loop, 3)
        if folder is not None:
            loop.engine.save_checkpoint(folder, tag="lost")
            stack.close()
            loop = Loop(case, Sampled())
            stack.callback(loop.stack.close)
            loop.engine.load_checkpoint(folder, tag="lost")
        wanted = loop.optimizer.wants_curvature()
        loop.train(4, case.steps)
        return {"wanted": wanted, "weights": loop.weights()}


def set_interval(loop: Loop, interval: int | None) -> None:
    for group in loop.optimizer.param_groups:
        group["interval"] = interval


def in_one_region_of_autocast(wrapper: str, what: str) -> list[list[float]]:
    """Losses of three steps, each pass in a region of its own, and all of a step in one."""
    return [_train_in_regions(wrapper, what, whole) for whole in (False, True)]


def _train_in_regions(wrapper: str, what: str, whole: bool) -> list[float]:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        for part in (model[0], model[2], model):
            fully_shard(part, reshard_after_forward=wrapper == "fsdp2")
    region = partial(torch.autocast, "cpu", torch.bfloat16)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if what == "curvature":
        optimizer = CurvatureSGD(model.named_parameters(), lr=0.3, momentum=0.0, interval=1)
    losses = []

    def backward() -> None:
        with region():
            loss = model(x).float().square().mean()
        loss.backward()
        losses.append(loss.item())

    extrapolation = None if what == "curvature" else Extrapolation(optimizer, 0.5)
    for _ in range(3):
        with region(enabled=whole):
            if extrapolation is None:
                assert optimizer.wants_curvature()
                backward()
                with optimizer.curvature():
                    backward()
            else:
                with torch.no_grad():
                    model(x)
                with extrapolation:
                    backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def extrapolate_in_a_curvature_trainer(folder: str) -> None:
    with redirect_stdout(None):
        trainer = CurvatureTrainer(
            model=trainer_runs._model(),
            args=trainer_runs.arguments(folder, "ddp"),
            train_dataset=trainer_runs.rows(),  # type: ignore[arg-type]
            optimizer_cls_and_kwargs=optimizer_for_trainer("curvature_adamw"),
        )
        trainer.add_callback(ExtrapolationCallback(0.1))
        trainer.train()
