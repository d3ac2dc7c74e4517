"""What runs inside the workers: programs with Lightning, and the same programs with torch or DeepSpeed alone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import deepspeed
import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.lightning import TrustRatioCallback
from trustratio.optimizers import CLARS, LARS, create_optimizer

from .lightning_runs import (
    INPUTS,
    ROWS,
    Loader,
    Module,
    Run,
    Tensors,
    fit,
    loss_of,
    micro_batches,
    network,
    strategy,
    trainer_of,
    whole,
)

# Sixteen bits -------------------------------------------------------------------------------------------------------

OVERFLOWS = 2.0**18
"""A loss scale with which the first steps are skipped."""


def both(run: Run, folder: str | Path) -> list[dict[str, Any]]:
    """The weights and ratios of a training with Lightning, and of the same without."""
    changes: dict[str, Any] = {}
    if run.precision == "16-mixed" and run.stage == "ddp":  # Lightning takes bf16 on a CPU unless it is told how
        scaler = torch.amp.GradScaler("cpu", init_scale=OVERFLOWS)
        changes = {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    module, trainer = Module(run), trainer_of(run, folder, **changes)
    return [fit(module, trainer), _by_deepspeed(run) if isinstance(run.stage, int) else _by_torch(run)]


def _by_torch(run: Run) -> dict[str, Any]:
    net, scaler = network(), torch.amp.GradScaler("cpu", init_scale=OVERFLOWS, enabled=run.precision == "16-mixed")
    if run.precision == "bf16-true":
        net = net.bfloat16()
    if run.stage == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (net[0], net[2], net):
            fully_shard(part, mesh=mesh)
    trained = DistributedDataParallel(net) if run.stage == "ddp" else net
    optimizer = create_optimizer(run.optimizer, net.named_parameters(), **run.options)
    ratios = []
    optimizer.register_step_post_hook(lambda *_: ratios.append(optimizer.trust_ratios()))
    dtype = torch.float16 if scaler.is_enabled() else torch.bfloat16
    for batch in micro_batches(run, dist.get_rank()).to(next(net.parameters()).dtype):
        with torch.autocast("cpu", dtype, enabled="mixed" in run.precision):
            loss = loss_of(trained, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {"weights": _whole(net), "ratios": ratios}


def _by_deepspeed(run: Run) -> dict[str, Any]:
    net = network()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": run.stage},
        "gradient_clipping": 0.0,
        **run.config,
    }
    if "true" in run.precision:
        net = net.to(torch.bfloat16)
    optimizer = create_optimizer(run.optimizer, net.named_parameters(), **run.options)
    ratios: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: ratios.append(optimizer.trust_ratios()))
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
    for batch in micro_batches(run, dist.get_rank()).to(next(net.parameters()).dtype):
        engine.backward(loss_of(engine, batch))
        engine.step()
    return {"weights": _whole(net), "ratios": ratios}


def _whole(net: torch.nn.Module) -> Tensors:
    return whole(net, type("Unwrapped", (), {"strategy": None}))


# Two optimizers -----------------------------------------------------------------------------------------------------


class Adversaries(torch.nn.Module):
    """A generator and a critic, in float64: what they learn from each other magnifies rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = network().double(), torch.nn.Linear(3, 1).double()
        with torch.no_grad():
            for number, parameter in enumerate(self.critic.parameters()):
                parameter.copy_(torch.linspace(-1 - number, 2, parameter.numel()).view(parameter.shape))

    def critics_loss(self, batch: torch.Tensor) -> torch.Tensor:
        made = self.generator(batch[:, :INPUTS]).detach()
        return (self.critic(batch[:, INPUTS:]) - 1).square().mean() + self.critic(made).square().mean()

    def generators_loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.critic(self.generator(batch[:, :INPUTS])) - 1).square().mean()

    def optimizers_of(self) -> tuple[LARS, CLARS]:
        options = {"lr": 0.5, "trust_coefficient": 0.02, "weight_decay": 0.1, "momentum": 0.5}
        return LARS(self.generator.named_parameters(), **options), CLARS(self.critic.named_parameters(), **options)


class Adversarial(lightning.LightningModule):
    """Steps both by hand in every batch; in DDP each with the other's parameters toggled off."""

    def __init__(self, stage: str):
        super().__init__()
        self.stage, self.nets, self.automatic_optimization = stage, Adversaries(), False

    def configure_model(self) -> None:
        if self.stage == "fsdp2":
            for part in (self.nets.generator, self.nets.critic):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        return list(self.nets.optimizers_of())

    def training_step(self, batch: torch.Tensor, number: int) -> None:
        generators, critics = self.optimizers()
        for optimizer, loss in ((critics, self.nets.critics_loss), (generators, self.nets.generators_loss)):
            # What fully_shard has gathered does not follow requires_grad.
            with optimizer.toggle_model() if self.stage == "ddp" else contextlib.nullcontext():
                optimizer.zero_grad()
                self.manual_backward(loss(batch.double()))
                optimizer.step()


def train_adversaries(stage: str, folder: str | Path) -> Tensors:
    run = Run(stage, loop="manual")
    module = Adversarial(stage)
    plan = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True) if stage == "ddp" else strategy(run)
    trainer = trainer_of(run, folder, strategy=plan)
    trainer.fit(module, Loader(run))
    return whole(module.nets, trainer)


def adversaries_plainly(ranks: int) -> tuple[Tensors, Tensors]:
    """Their weights at first, and after the same steps in one process and float64."""
    run, nets = Run(), Adversaries()
    start = {name: parameter.detach().clone() for name, parameter in nets.named_parameters()}
    generators, critics = nets.optimizers_of()
    of_ranks = [micro_batches(run, rank).double() for rank in range(ranks)]
    for step in range(run.steps):
        for optimizer, loss in ((critics, nets.critics_loss), (generators, nets.generators_loss)):
            optimizer.zero_grad()
            for batches in of_ranks:
                (loss(batches[step]) / ranks).backward()
            optimizer.step()
    return start, nets.state_dict()


# Callbacks ----------------------------------------------------------------------------------------------------------


class Notes(CSVLogger):
    """Keeps what is logged."""

    def __init__(self, folder: str | Path):
        super().__init__(str(folder))
        self.noted: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith(("trust_ratio", "gradient_noise")) for name in metrics):
            assert step is not None
            self.noted.append((step, metrics))


def logged(run: Run, folder: str | Path) -> tuple[list[tuple[int, dict[str, float]]], dict[str, Any]]:
    """What TrustRatioCallback logs on this rank of every second step, and what `train` returns."""
    notes, noise = Notes(folder), None if run.stage == "fsdp1" else ROWS
    trainer = trainer_of(run, folder, logger=notes)
    trainer.callbacks.append(TrustRatioCallback(every=2, per_layer=True, noise=noise))
    return notes.noted, fit(Module(run), trainer)
