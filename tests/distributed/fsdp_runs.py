"""FSDP2 training in the workers: how a model is sharded, and a run that records what the tests compare."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from trustratio.optimizers import OPTIMIZERS

from .cases import (
    Case,
    LayerSpec,
    Model,
    group_gradients,
    initial_weights,
    make_optimizer,
    mean_gradients,
)
from .collective_counter import CollectiveCounter
from .exactness import MODEL, NOISE, STEPS, assert_exact, two_groups
from .pool import WorkerPool

EXACT = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
MESHES = {"fsdp": None, "hsdp": (2, 2)}


def make_case(name: str, layers: tuple[LayerSpec, ...] = MODEL, **changes: Any) -> Case:
    changes.setdefault("noise", NOISE.get(name, 0.0))
    changes.setdefault("steps", STEPS.get(name, 5))
    return Case(name, layers, "fsdp", two_groups(name, **changes.pop("options", {})), **changes)


def second_dimension(parameter: torch.nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.dim() > 1 else None


# Inside the workers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How the model is sharded.

    Attributes:
        mesh: Shape of the mesh; None for all ranks in one dimension.
        units: Whether every layer is sharded on its own, beside the whole model.
        checkpointing: Recompute every layer in backward.
        keep: What to keep unreduced while gradients accumulate: "sharded" gradients (set_requires_gradient_sync), those
            of a replica (set_requires_all_reduce), or None.
        wrap: "fully_shard"; "accelerate", whose Accelerator calls it; "swap", where the optimizer is made before and
            its parameters are then replaced, as accelerate does; or "stale", where they are not replaced.
        options: Further arguments of fully_shard.
        clipping: The user's clip_grad_norm_.
        checkpoint: Save after three steps and go on in a new model and optimizer, from this folder.
    """

    mesh: tuple[int, ...] | None = None
    units: bool = False
    checkpointing: bool = False
    keep: str | None = "sharded"
    wrap: str = "fully_shard"
    options: dict[str, Any] | None = None
    clipping: float | None = None
    checkpoint: str | None = None


def make_mesh(shape: tuple[int, ...] | None) -> DeviceMesh:
    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def prepare_with_accelerate(model: Model, optimizer: Any) -> None:
    """Accelerator.prepare with FSDP2, which accelerate itself leaves switched off without an accelerator."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    options = {"cpu_ram_efficient_loading": False, "auto_wrap_policy": "NO_WRAP"}
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    accelerator.prepare(model, optimizer)


class Run:
    def __init__(self, case: Case, setup: Setup):
        self.case, self.setup = case, setup
        self.model = Model(case)
        self.model.load(initial_weights(case))
        early = None if setup.wrap == "fully_shard" else make_optimizer(case, self.model)
        before = dict(self.model.named_parameters())
        if setup.checkpointing:
            for name, leaf in self.model.leaves.items():
                self.model.leaves[name] = checkpoint_wrapper(leaf)
        if setup.wrap == "accelerate":
            prepare_with_accelerate(self.model, early)
        for part in (
            () if setup.wrap == "accelerate" else (*(self.model.leaves.values() if setup.units else ()), self.model)
        ):
            fully_shard(part, mesh=make_mesh(setup.mesh), **(setup.options or {}))
        after = dict(self.model.named_parameters())
        self.optimizer: Any = early or make_optimizer(case, self.model)
        if setup.wrap == "swap":
            replaced = {id(p): after[name] for name, p in before.items()}
            for group in self.optimizer.param_groups:
                group["params"] = [replaced[id(p)] for p in group["params"]]
        self.counter = CollectiveCounter(self.optimizer)
        self.ratios: list[dict[str, float]] = []

    def train(self, first: int, last: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        for step in range(first, last):
            means = mean_gradients(self.case)[step]
            of_groups = group_gradients(self.case, step, means, world * self.case.accumulation)
            for micro in range(self.case.accumulation):
                last = micro == self.case.accumulation - 1
                if self.setup.keep == "sharded":
                    self.model.set_requires_gradient_sync(last)
                elif self.setup.keep == "replica":
                    self.model.set_requires_all_reduce(last)
                given = {name: g[micro * world + rank] for name, g in of_groups.items()}
                (self.model(given) / self.case.accumulation).backward()
            if self.setup.clipping is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ratios.append(self.optimizer.trust_ratios() if hasattr(self.optimizer, "trust_ratios") else {})

    def save(self, folder: str) -> None:
        state = {"model": self.model.state_dict(), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        dcp.save(state, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        state = {"model": self.model.state_dict(), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def result(self) -> dict[str, Any]:
        weights = {layer.name: self.model.leaves[layer.name].weight for layer in self.case.layers}
        state = self.optimizer.state
        return {
            "weights": {name: p.full_tensor().detach().float().clone() for name, p in weights.items()},
            "ratios": self.ratios,
            "collectives": self.counter.per_call,
            "all_reduces": self.counter.all_reduces,
            "step_counts": {name: float(state[p].get("step", 0)) for name, p in weights.items()},
            "local_elements": {name: p.to_local().numel() for name, p in weights.items()},
            "cut_alike": all(
                isinstance(value, DTensor) and value.placements == p.placements and value.shape == p.shape
                for p in weights.values()
                for value in (state[p][name] for name in self.optimizer.element_state)
            ),
        }

    def close(self) -> None:
        self.counter.close()
        self.model = self.optimizer = None  # type: ignore[assignment]
        gc.collect()


@contextmanager
def running(case: Case, setup: Setup) -> Iterator[Run]:
    run = Run(case, setup)
    try:
        yield run
    finally:
        run.close()


def run_case(case: Case, setup: Setup) -> dict[str, Any]:
    with running(case, setup) as run:
        if setup.checkpoint is None:
            run.train(0, case.steps)
            return run.result()
        run.train(0, 3)
        run.save(setup.checkpoint)
    # Other weights, so that what is not restored shows.
    with running(replace(case, seed=case.seed + 7), setup) as fresh:
        fresh.load(setup.checkpoint)
        fresh.case = case
        fresh.train(3, case.steps)
        return fresh.result()


def run_exact(pool: WorkerPool, case: Case, setup: Setup, bound: float = 2e-6) -> list[dict[str, Any]]:
    answers = pool.run(run_case, case, setup)
    assert_exact(case, answers, bound)
    return answers
