"""A model under a wrapper, with its optimizer: made, stepped, saved and loaded as the wrapper's users do it."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from .accelerated import prepared_engine
from .configurations import Configuration
from .errors import CannotAudit
from .padding import layers_of
from .subject import Subject

__all__ = ["Wrapped", "scheduled", "wrap"]

MOST_OVERFLOWS = 40
CHECKPOINT = "checkpoint"


class Wrapped(ABC):
    """One wrapper around a model and its optimizer.

    Attributes:
        model: The user's module; its parameters may be the wrapper's by now.
        injection: Makes its gradients.
        given: The optimizer that was made, by the user or by DeepSpeed for its section.
        given_rates: Its groups' learning rates when it was made.
        optimizer: The one that is stepped in the end.
        scheduler: What drives its learning rates, if the wrapper brought that.
        clipping: Norm to which the wrapper clips the whole model's gradient; 0: not.
        trained: What is called in the model's place.
    """

    scheduler: Any = None
    clipping: float = 0.0
    trained: Any = None

    def __init__(self, subject: Subject, configuration: Configuration, seed: int, device: torch.device):
        self.subject, self.configuration, self.device = subject, configuration, device
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        dtype = torch.float32 if configuration.wrapper == "deepspeed" else None
        self.model, self.injection = subject.make_model(self.ranks * configuration.accumulation, dtype, seed)
        self.given: torch.optim.Optimizer
        self.given_rates: list[float]
        self.optimizer: torch.optim.Optimizer
        self.wrap()

    @abstractmethod
    def wrap(self) -> None:
        """Make optimizer and wrapper."""

    def make_optimizer(self, model: nn.Module) -> None:
        """Make the user's, of the model as it is now."""
        self.given = self.optimizer = self.subject.make_optimizer(model)
        self.given_rates = rates(self.given)

    def update(self) -> None:
        """All micro-batches of one step, and the step."""
        for _ in self.micro_batches():
            loss = self.trained() / self.configuration.accumulation
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def micro_batches(self) -> Iterator[int]:
        """Yield the number of each micro-batch, while backward makes its gradients."""
        for micro in range(self.configuration.accumulation):
            self.injection.group = micro * self.ranks + self.rank
            yield micro

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's trainable layers, whole, on the CPU."""
        with self.whole_parameters():
            named = layers_of(self.model)
            return {name: whole_copy(named[name]) for name in self.injection.shapes}

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Have the model's parameters whole, or such that `whole_copy` makes them so."""
        yield

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a checkpoint, in the wrapper's own way."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read it again."""

    def sum_over_ranks(self, number: int) -> int:
        """The sum of what all ranks say."""
        total = torch.tensor(number, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def close(self) -> None:
        """Let go of everything."""
        del self.model, self.given, self.optimizer, self.trained
        gc.collect()


def whole_copy(parameter: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, of a DTensor all of it."""
    full = getattr(parameter.detach(), "full_tensor", None)
    return (parameter.detach() if full is None else full()).cpu().clone()


def scheduled(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What schedulers drive, of each group: learning rates, and momenta as DeepSpeed's OneCycle does."""
    groups = optimizer.param_groups
    momenta = [{str(name): group[name] for name in ("betas", "momentum") if name in group} for group in groups]
    return [{"lr": rate, **of_group} for rate, of_group in zip(rates(optimizer), momenta, strict=True)]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group; NaN where there is none."""
    given = [group.get("lr") for group in optimizer.param_groups]
    return [float("nan") if rate is None else float(rate) for rate in given]


def wrap(subject: Subject, configuration: Configuration, seed: int, device: torch.device) -> Wrapped:
    """Make the model and wrap it, on this rank of the process group."""
    return WRAPPERS[configuration.wrapper](subject, configuration, seed, device)


class _DistributedDataParallel(Wrapped):
    def wrap(self) -> None:
        self.model.to(self.device)
        options = {"find_unused_parameters": True, **self.configuration.options}
        self.trained = nn.parallel.DistributedDataParallel(self.model, **options)
        self.make_optimizer(self.model)

    def save(self, folder: Path) -> None:
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.consolidate_state_dict(to=0)
        try:
            if self.rank == 0:
                state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                torch.save(state, folder / CHECKPOINT)
        finally:  # the others wait
            dist.barrier()

    def load(self, folder: Path) -> None:
        state = torch.load(folder / CHECKPOINT, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class _FSDP2(Wrapped):
    def wrap(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.model.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        for part in (*repeated_parts(self.model), self.model):
            fully_shard(part, mesh=mesh, **self.configuration.options)
        self.trained = self.model
        self.make_optimizer(self.model)

    def save(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(), checkpoint_id=folder / CHECKPOINT)

    def load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        state = self._state()
        # Of a layer without gradient torch asks for state here that a run never makes.
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(state, checkpoint_id=folder / CHECKPOINT, planner=planner)
        set_state_dict(
            self.trained,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),  # a layer without gradient may have no state
        )

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.trained, self.optimizer)
        return {"model": model, "optimizer": optimizer}


class _FSDP1(Wrapped):
    def wrap(self) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import CustomPolicy

        parts = set(map(id, repeated_parts(self.model)))
        options = {"use_orig_params": True, **self.configuration.options}
        self.trained = FullyShardedDataParallel(
            self.model,
            auto_wrap_policy=CustomPolicy(lambda module: id(module) in parts),
            device_id=self.device,
            **options,
        )
        # With flat parameters, the optimizer's are the wrapper's.
        self.make_optimizer(self.trained)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.trained, writeback=False):
            yield

    def save(self, folder: Path) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with self._whole_states():
            optimizer = FullyShardedDataParallel.optim_state_dict(self.trained, self.optimizer)
            state = {"model": self.trained.state_dict(), "optimizer": optimizer}
        try:
            if self.rank == 0:
                torch.save(state, folder / CHECKPOINT)
        finally:  # the others wait
            dist.barrier()

    def load(self, folder: Path) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        state = torch.load(folder / CHECKPOINT, weights_only=False)
        with self._whole_states():
            self.trained.load_state_dict(state["model"])
            optimizer = FullyShardedDataParallel.optim_state_dict_to_load(
                self.trained, self.optimizer, state["optimizer"]
            )
        self.optimizer.load_state_dict(optimizer)

    def _whole_states(self) -> AbstractContextManager[Any]:
        from torch.distributed.fsdp import (
            FullOptimStateDictConfig,
            FullStateDictConfig,
            FullyShardedDataParallel,
            StateDictType,
        )

        return FullyShardedDataParallel.state_dict_type(
            self.trained,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),  # True aliases states that are on the CPU
        )


class _DeepSpeed(Wrapped):
    def wrap(self) -> None:
        import deepspeed

        from ..deepspeed.building import leave_out_shared_memory

        self._refuse_what_is_not_sent()
        leave_out_shared_memory()
        if self.device.type == "cpu":  # DeepSpeed refuses processors on which fp16 is slow
            deepspeed.get_accelerator().is_fp16_supported = lambda: True
        config, given = self.configuration.options, None
        if "optimizer" not in config:  # else DeepSpeed makes it
            self.make_optimizer(self.model)
            given = self.given
            self._refuse_groups_at_rest(self.given)
        if self.configuration.accelerate is None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            self.trained, *_ = deepspeed.initialize(
                model=self.model, optimizer=given, model_parameters=trainable, config=config
            )
        else:
            self.trained = prepared_engine(self.configuration, self.model, given)
        self.optimizer = self.trained.basic_optimizer
        if given is None:
            self.given, self.given_rates = self.optimizer, self._rates_of_the_section()
        self.scheduler = self.trained.lr_scheduler
        self.clipping = float(self.trained.gradient_clipping() or 0.0)

    def _refuse_what_is_not_sent(self) -> None:
        """Whatever DeepSpeed's first broadcast, of bytes, does not take."""
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 0:
                raise CannotAudit(f"DeepSpeed takes no parameter without dimensions, as {name}: make it of shape (1,)")
            if parameter.stride(-1) != 1 or not parameter.is_contiguous():
                raise CannotAudit(
                    f"DeepSpeed takes no parameter whose elements lie in another order in memory, as {name}, be it by "
                    "channels_last or a transposition: make it anew by "
                    "parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)"
                )

    def _refuse_groups_at_rest(self, optimizer: torch.optim.Optimizer) -> None:
        if self.configuration.zero_stage not in (1, 2):
            return
        for index, group in enumerate(optimizer.param_groups):
            if group["params"] and not any(p.requires_grad for p in group["params"]):
                raise CannotAudit(
                    f"group {index} of the optimizer has no parameter that is trained, with which DeepSpeed's ZeRO-1 "
                    "and 2 cannot be set up: leave the group out"
                )

    def _rates_of_the_section(self) -> list[float]:
        """Before a scheduler has set others."""
        return [float(self.optimizer.defaults["lr"])] * len(self.optimizer.param_groups)

    def update(self) -> None:
        for _ in range(MOST_OVERFLOWS):
            skipped = self.trained.skipped_steps
            for _ in self.micro_batches():
                self.trained.backward(self.trained())
                self.trained.step()
            if self.trained.skipped_steps == skipped:
                return
        overflowed = f"{MOST_OVERFLOWS} steps in a row overflowed in {self.configuration.dtype}"
        if self.configuration.dtype != "fp16":
            raise CannotAudit(overflowed)
        scale = self.trained.loss_scale() or self.trained.initial_dynamic_scale()
        raise CannotAudit(
            f"{overflowed}, which began with a loss scale of {scale:g}: lower fp16.loss_scale, or initial_scale_power "
            "where the scale is dynamic"
        )

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        import deepspeed

        sharded = [p for p in self.model.parameters() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            yield

    def save(self, folder: Path) -> None:
        self.trained.save_checkpoint(str(folder), tag=CHECKPOINT)

    def load(self, folder: Path) -> None:
        path, _ = self.trained.load_checkpoint(str(folder), tag=CHECKPOINT)
        if path is None:
            raise RuntimeError("DeepSpeed did not load the checkpoint that it had written")

    def close(self) -> None:
        self.trained.destroy()
        super().close()


WRAPPERS: dict[str, type[Wrapped]] = {
    "ddp": _DistributedDataParallel,
    "fsdp1": _FSDP1,
    "fsdp2": _FSDP2,
    "deepspeed": _DeepSpeed,
}


def repeated_parts(model: nn.Module) -> list[nn.Module]:
    """The modules of the outermost lists, to be sharded one by one; not those that share parameters with others."""
    parts: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and id(module) not in inside and module is not model:
            inside.update(map(id, module.modules()))
            parts += [part for part in _without_lists(module) if next(part.parameters(), None) is not None]
    return [part for part in parts if _keeps_to_itself(part, model)]


def _without_lists(module: nn.Module) -> Iterator[nn.Module]:
    """Its children; of lists among them, which are never called, theirs."""
    for part in module.children():
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            yield from _without_lists(part)
        else:
            yield part


def _keeps_to_itself(part: nn.Module, model: nn.Module) -> bool:
    within = set(map(id, part.modules()))
    own = {id(p) for p in part.parameters()}
    others = (p for m in model.modules() if id(m) not in within for p in m.parameters(recurse=False))
    return not any(id(p) in own for p in others)
