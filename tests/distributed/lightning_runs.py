"""What runs inside the workers to train with Lightning's Trainer, and the same steps in float64 without it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from trustratio.integrations.layer_norms import clip_grad_norm_
from trustratio.integrations.lightning import DivideLossOnce
from trustratio.optimizers import create_optimizer
from trustratio.recipes.rules.schedules import WarmupPolynomial

from ..reference import run_reference
from .cases import gathered
from .collective_counter import CollectiveCounter

INPUTS, HIDDEN, OUTPUTS, ROWS = 6, 5, 3, 2
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

Tensors = dict[str, torch.Tensor]


class Fsdp1OnCpu(FSDPStrategy):
    """Lightning asks for a GPU where the strategy is its own class, and not a subclass; torch wants the device."""

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            return super()._setup_model(model)
        given = {"mixed_precision": self.mixed_precision_config, "device_id": self.root_device, **self.kwargs}
        return super()._setup_model(FullyShardedDataParallel(model, **given))


class DeepSpeedOnCpu(DeepSpeedStrategy):
    """Leaves out what asks for a GPU; all else is Lightning's."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # of which DeepSpeed wants a number

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        stage: "ddp", "fsdp1", "fsdp2" or DeepSpeed's stage.
        options: Of the optimizer.
        loop: "automatic"; or by hand "manual", "no_sync" (as that, and gradients are reduced for the last micro-batch
            of a step alone) or "closure".
        accumulation: Micro-batches of each step.
        steps: In all epochs together.
        precision: Lightning's.
        clip: Arguments of the Trainer.
        config: Of DeepSpeed, besides the stage.
        parts: Whether parts of the module are wrapped by hand under FSDP1, which loops by hand need.
        scheduled: Whether the rate is warmed up over two steps, and falls to zero at the tenth.
        callbacks: Kinds of callbacks, which are made in the workers.
    """

    stage: str | int = "ddp"
    optimizer: str = "lars"
    options: dict[str, Any] = field(default_factory=dict)
    loop: str = "automatic"
    accumulation: int = 1
    steps: int = 4
    precision: str = "32-true"
    clip: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parts: bool = False
    scheduled: bool = False
    callbacks: tuple[type, ...] = (DivideLossOnce,)


def network() -> torch.nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def micro_batches(run: Run, rank: int) -> torch.Tensor:
    """Of one rank, shape (steps · accumulation, rows, inputs + outputs)."""
    generator = torch.Generator().manual_seed(11 + rank)
    return torch.randn(run.steps * run.accumulation, ROWS, INPUTS + OUTPUTS, generator=generator)


def loss_of(net: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (net(batch[:, :INPUTS]) - batch[:, INPUTS:]).square().mean()


class Stream:
    """Does not say how long it is, and goes on where a checkpoint was written."""

    def __init__(self, run: Run):
        self.batches = micro_batches(run, dist.get_rank())
        self.batch_size, self.place = ROWS, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class ThreeBatches(Stream):
    def __init__(self, run: Run):
        super().__init__(run)
        self.batches = self.batches[:3]


class Loader(Stream):
    def __len__(self) -> int:
        return len(self.batches)


class Module(lightning.LightningModule):
    def __init__(self, run: Run, save: tuple[int, Path] | None = None):
        super().__init__()
        self.run_of, self.net, self.save = run, network(), save
        self.automatic_optimization = run.loop == "automatic"
        self.ratios: list[dict[str, float]] = []
        self.rates: list[float] = []

    def configure_model(self) -> None:
        if self.run_of.stage == "fsdp2":
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        elif self.run_of.parts:
            self.net = FullyShardedDataParallel(self.net, use_orig_params=True, device_id=torch.device("cpu"))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if gradient_clip_algorithm == "norm" and self.run_of.stage == "fsdp1":  # for which Lightning has nothing
            clip_grad_norm_(optimizer, gradient_clip_val)
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        run = self.run_of
        optimizer = create_optimizer(run.optimizer, self.net.named_parameters(), **run.options)
        self.counter = CollectiveCounter(optimizer)
        optimizer.register_step_post_hook(lambda *_: self._note(optimizer))
        if not run.scheduled:
            return optimizer
        scheduler = WarmupPolynomial(optimizer, 2, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _note(self, optimizer: Any) -> None:
        self.ratios.append(optimizer.trust_ratios())
        self.rates.append(optimizer.param_groups[0]["lr"])

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor | None:
        if self.automatic_optimization:
            return loss_of(self.net, batch)
        is_last = (number + 1) % self.run_of.accumulation == 0
        if self.run_of.loop == "closure" and is_last:
            self.optimizers().step(closure=lambda: self._backward(batch))
        else:
            with self._unreduced() if self.run_of.loop == "no_sync" and not is_last else contextlib.nullcontext():
                self._backward(batch)
            if is_last:
                self.optimizers().step()
        if is_last:
            self.optimizers().zero_grad()
        return None

    def _backward(self, batch: torch.Tensor) -> None:
        self.manual_backward(loss_of(self.net, batch) / self.run_of.accumulation)

    @contextlib.contextmanager
    def _unreduced(self) -> Iterator[None]:
        if self.run_of.stage == "fsdp2":
            self.net.set_requires_gradient_sync(False)
            yield
            self.net.set_requires_gradient_sync(True)
        else:
            with (self.net if self.run_of.parts else self.trainer.strategy.model).no_sync():
                yield

    def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
        if self.save is not None and number + 1 == self.save[0]:
            self.trainer.save_checkpoint(self.save[1])


def strategy(run: Run) -> Any:
    if run.stage == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if run.stage == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    if run.stage == "fsdp1":
        # Of whole states, one rank of torch 2.13 crashes in optim_state_dict on a CPU, whatever the optimizer.
        return Fsdp1OnCpu(process_group_backend="gloo", state_dict_type="sharded")
    config = {"zero_optimization": {"stage": run.stage}, "zero_allow_untested_optimizer": False, **run.config}
    return DeepSpeedOnCpu(config=config, process_group_backend="gloo")


def trainer_of(run: Run, folder: str | Path, **changes: Any) -> lightning.Trainer:
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.")
    given: dict[str, Any] = {"max_epochs": 1, "precision": run.precision, **QUIET, **run.clip, **changes}
    if run.loop == "automatic":
        given["accumulate_grad_batches"] = run.accumulation
    return lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=given.pop("strategy", None) or strategy(run),
        default_root_dir=folder,
        use_distributed_sampler=False,
        callbacks=[kind() for kind in run.callbacks],
        **given,
    )


def train(run: Run, folder: str | Path, **changes: Any) -> dict[str, Any]:
    """Train; the weights, each step's ratios, and how often it reduced."""
    return fit(Module(run), trainer_of(run, folder, **changes))


def fit(
    module: Module, trainer: lightning.Trainer, checkpoint: Path | None = None, loader: type[Stream] = Loader
) -> dict[str, Any]:
    try:
        trainer.fit(module, loader(module.run_of), ckpt_path=checkpoint)
    finally:
        CollectiveCounter.close_all()
    return {
        "weights": whole(module.net, trainer),
        "ratios": module.ratios,
        "rates": module.rates,
        "all_reduces": module.counter.all_reduces,
    }


class StopAfter(lightning.Callback):
    """As Lightning's Timer does, at the end of a batch."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        trainer.should_stop = number + 1 == self.batches


def refusal(
    run: Run, folder: str | Path, loader: type[Stream] = Loader, stop_after: int = 0, **changes: Any
) -> tuple[str, int]:
    """Train; the error, and the steps that were taken before it."""
    module, trainer = Module(run), trainer_of(run, folder, **changes)
    if stop_after:
        trainer.callbacks.append(StopAfter(stop_after))
    try:
        fit(module, trainer, loader=loader)
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(module.ratios)
    return "", len(module.ratios)


def resumed(run: Run, batches: int, folder: str) -> dict[str, Any]:
    """Write a checkpoint after so many batches, and train from there; with what was warned of."""
    file = Path(folder) / f"{run.stage}.ckpt"
    fit(Module(run, (batches, file)), trainer_of(run, folder))
    trainer = trainer_of(run, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = fit(Module(run), trainer, file)
    return {**answer, "warned": [str(one.message) for one in caught]}


def whole(net: torch.nn.Module, trainer: Any) -> Tensors:
    named = {name.replace("_fsdp_wrapped_module.", ""): parameter for name, parameter in net.named_parameters()}
    return {name: _whole(parameter.detach(), name, trainer.strategy) for name, parameter in named.items()}


def _whole(parameter: Any, name: str, strategy: Any) -> torch.Tensor:
    if isinstance(strategy, FSDPStrategy):  # which leaves each rank the run of elements that it has of a layer
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, parameter.flatten())
        return torch.cat(parts).view(network().get_parameter(name).shape)
    with gathered([parameter]):
        return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).clone()


# Without Lightning --------------------------------------------------------------------------------------------------


def train_plainly(run: Run, ranks: int) -> dict[str, Any]:
    """The same steps in one process, in float64, by the references of tests/reference.py."""
    net = network().double()
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    gradients, weights, ratios = [], start, []
    for step in range(run.steps):
        of_step = slice(step * run.accumulation, (step + 1) * run.accumulation)
        groups = [batch for rank in range(ranks) for batch in micro_batches(run, rank)[of_step].double()]
        gradients.append(_clipped(run, [_gradients(run, net, batch) for batch in groups]))
        weights, ratios = run_reference(run.optimizer, start, gradients, dict.fromkeys(start, run.options))
        net.load_state_dict(weights)
    return {"start": start, "weights": weights, "ratios": ratios}


def _gradients(run: Run, net: torch.nn.Module, batch: torch.Tensor) -> Tensors:
    named = dict(net.named_parameters())
    found = torch.autograd.grad(loss_of(net, batch), list(named.values()))
    return dict(zip(named, found, strict=True))


def _clipped(run: Run, groups: list[Tensors]) -> Tensors:
    stacked = {name: torch.stack([group[name] for group in groups]) for name in groups[0]}
    limit = run.clip.get("gradient_clip_val")
    if limit is None:
        return stacked
    if run.clip.get("gradient_clip_algorithm") == "value":
        return {name: gradients.mean(0, keepdim=True).clamp(-limit, limit) for name, gradients in stacked.items()}
    norm = torch.cat([gradients.mean(0).flatten() for gradients in stacked.values()]).norm()
    return {name: gradients * (limit / (norm + 1e-6)).clamp(max=1.0) for name, gradients in stacked.items()}
