"""Runs that keep numbers of 16 bits go on from every kind of checkpoint to the bit, however they are sharded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import LAMB
from trustratio.optimizers.formulas.chunk_view import COMPENSATION
from trustratio.optimizers.sharding.local_tensors import local_part

from .cases import Model, initial_weights, mean_gradients
from .fsdp_runs import make_mesh
from .pool import Pools, WorkerPool
from .sixteen_bit_runs import (
    BF16_OPTIMIZER,
    FP32,
    KEPT,
    SAVED,
    STEPS,
    WAYS_HERE,
    assert_same,
    dcp_state,
    make_case,
    resume,
    running,
    straight,
    warned_resume,
    write,
)

NAMES = ("lamb", "lars", "novograd", "adabelief")
ROUNDED = [kept for kept in KEPT if kept != "fp32"]


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from an optimizer and how it keeps numbers to the file of one process that took all steps."""
    folder = tmp_path_factory.mktemp("alone")

    def of(name: str, kept: str) -> str:
        path = folder / f"{name}-{kept}"
        if not path.exists():
            straight(make_case(name, "dense", kept), kept, str(path))
        return str(path)

    return of


def go_on(pool: WorkerPool, way: str, case: Any, kept: str, folder: Path) -> str:
    """Save and resume on the same ranks; the file of what there is in the end."""
    pool.run(write, way, case, kept, str(folder / "middle"))
    pool.run(resume, way, case, kept, str(folder / "middle"), str(folder / "end"))
    return str(folder / "end")


# The wrappers' own checkpoints, on as many ranks --------------------------------------------------------------------

OWN = [
    *[(stage, "state", "engine's own", FP32) for stage in (0, 1, 2, 3)],
    *[(stage, "state", "engine's own", {}) for stage in (1, 2, 3)],
    (1, "state", "engine's own", BF16_OPTIMIZER),
    *[("ddp", kept, "state_dict", {}) for kept in ROUNDED],
    *[("fsdp", kept, "state_dict", {}) for kept in ROUNDED],
    *[("fsdp", kept, "dcp", {}) for kept in ROUNDED],
    *[("fsdp1", kept, "fsdp1", {}) for kept in ROUNDED],
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("stage", "kept", "way", "config"), OWN)
@pytest.mark.parametrize("world_size", [2])
def test_own_checkpoints(
    pool: WorkerPool,
    alone: Any,
    tmp_path: Path,
    name: str,
    stage: Any,
    kept: str,
    way: str,
    config: dict[str, Any],
    world_size: int,
) -> None:
    case = make_case(name, stage, kept, config=config)
    assert_same(go_on(pool, way, case, kept, tmp_path), alone(name, kept))


# From one sharding to another ----------------------------------------------------------------------------------------

# Written on so many ranks, by this wrapper, with this configuration; read on so many, by that, with that.
BETWEEN: tuple[tuple[str, int, Any, dict[str, Any], int, Any, dict[str, Any]], ...] = (
    ("consolidated", 1, "ddp", {}, 2, 3, {}),
    ("consolidated", 2, 3, FP32, 2, "fsdp", {}),
    ("consolidated", 2, "fsdp", {}, 2, 1, BF16_OPTIMIZER),
    ("consolidated", 2, "fsdp1", {}, 4, 2, {}),
    ("consolidated", 2, "megatron", {}, 2, "fsdp1", {}),
    ("consolidated", 4, 2, {}, 2, "megatron", {}),
    ("consolidated", 4, "hsdp", {}, 2, "ddp", {}),
    ("engine", 2, 1, {}, 4, 3, {}),
    ("engine", 4, 3, {}, 2, 2, {}),
    ("dcp", 2, "fsdp", {}, 4, "fsdp", {}),
    ("dcp", 4, "hsdp", {}, 2, "fsdp", {}),
)
BETWEEN_BF16: tuple[tuple[str, int, str, int, str], ...] = (
    ("consolidated", 2, "fsdp", 4, "hsdp"),
    ("consolidated", 4, "fsdp", 2, "fsdp1"),
    ("consolidated", 2, "fsdp1", 2, "ddp"),
    ("consolidated", 1, "ddp", 2, "fsdp"),
    ("dcp", 2, "fsdp", 4, "fsdp"),
    ("dcp", 4, "fsdp", 2, "fsdp"),
)


@pytest.mark.parametrize("name", ["lamb", "novograd"])
@pytest.mark.parametrize(("way", "writers", "written", "before", "world_size", "stage", "config"), BETWEEN)
def test_state_in_bf16_under_another_sharding(
    pools: Pools,
    alone: Any,
    tmp_path: Path,
    name: str,
    way: str,
    writers: int,
    written: Any,
    before: dict[str, Any],
    world_size: int,
    stage: Any,
    config: dict[str, Any],
) -> None:
    case = make_case(name, written, "state", config=before)
    pools.get(writers).run(write, way, case, "state", str(tmp_path / "middle"))
    case = make_case(name, stage, "state", config=config)
    pools.get(world_size).run(resume, way, case, "state", str(tmp_path / "middle"), str(tmp_path / "end"))
    assert_same(tmp_path / "end", alone(name, "state"))


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("kept", ["stochastic", "kahan", "kahan and state"])
@pytest.mark.parametrize(("way", "writers", "written", "world_size", "stage"), BETWEEN_BF16)
def test_bf16_weights_under_another_sharding(
    pools: Pools,
    alone: Any,
    tmp_path: Path,
    name: str,
    kept: str,
    way: str,
    writers: int,
    written: str,
    world_size: int,
    stage: str,
) -> None:
    pools.get(writers).run(write, way, make_case(name, written, kept), kept, str(tmp_path / "middle"))
    case = make_case(name, stage, kept)
    pools.get(world_size).run(resume, way, case, kept, str(tmp_path / "middle"), str(tmp_path / "end"))
    assert_same(tmp_path / "end", alone(name, kept))


# Files of runs that keep numbers otherwise ----------------------------------------------------------------------------

CONVERTED: tuple[tuple[str, Any, dict[str, Any], str, str], ...] = (
    *[
        ("engine's own", stage, FP32, *pair)
        for stage in (0, 1, 2, 3)
        for pair in (("fp32", "state"), ("state", "fp32"))
    ],
    ("engine's own", 2, {}, "fp32", "state"),
    ("engine", 3, {}, "fp32", "state"),
    ("state_dict", "ddp", {}, "kahan", "stochastic"),
    ("dcp", "fsdp", {}, "fp32", "state"),
    ("dcp", "fsdp", {}, "kahan", "stochastic"),
    ("fsdp1", "fsdp1", {}, "state", "fp32"),
    ("fsdp1", "fsdp1", {}, "kahan", "stochastic"),
    ("consolidated", "fsdp", {}, "kahan", "stochastic"),
    ("consolidated", "fsdp", {}, "fp32", "kahan"),
    ("consolidated", 2, {}, "fp32", "state"),
)


@pytest.mark.parametrize(("way", "stage", "config", "saved", "kept"), CONVERTED)
@pytest.mark.parametrize("world_size", [2])
def test_state_is_converted_as_in_one_process(
    pool: WorkerPool,
    tmp_path: Path,
    way: str,
    stage: Any,
    config: dict[str, Any],
    saved: str,
    kept: str,
    world_size: int,
) -> None:
    pool.run(write, way, make_case("lamb", stage, saved, config=config), saved, str(tmp_path / "middle"))
    case = make_case("lamb", stage, kept, config=config)
    warned = pool.run(warned_resume, way, case, kept, str(tmp_path / "middle"), str(tmp_path / "end"))
    whole = "consolidated" if way == "consolidated" else "state_dict"
    write(whole, make_case("lamb", "dense", saved), saved, str(tmp_path / "alone"))
    here = make_case("lamb", "dense", kept)
    expected = warned_resume(whole, here, kept, str(tmp_path / "alone"), str(tmp_path / "expected"))
    assert_same(tmp_path / "end", tmp_path / "expected")
    said = int((saved, kept) != ("fp32", "kahan"))
    assert [len(sentences) for sentences in (expected, *warned)] == [said] * (1 + world_size)


def load_partly(case: Any, kept: str, path: str) -> bool:
    """Whether DCP without and with `allow_partial_load` reads it; then all compensation is zero."""
    missing = pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*\.compensation")
    with running(case, kept, seed=7) as run, missing:
        WAYS_HERE["dcp"].load(run, path)
    with running(case, kept, seed=7) as run:
        state = dcp_state(run)
        dcp.load(state, checkpoint_id=path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
        return not any(bool(local_part(s[COMPENSATION]).any()) for s in run.optimizer.state.values())


@pytest.mark.parametrize("world_size", [2])
def test_dcp_asks_for_a_compensation(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    path = str(tmp_path / "middle")
    pool.run(write, "dcp", make_case("lamb", "fsdp", "stochastic"), "stochastic", path)
    assert pool.run(load_partly, make_case("lamb", "fsdp", "kahan and state"), "kahan and state", path) == [True, True]


# Other cuts -----------------------------------------------------------------------------------------------------------

SHAPE = (6, 5, 3)
PLACEMENTS: tuple[tuple[Any, ...], ...] = ((Shard(0),), (Shard(1),), (Replicate(),))


def train_cut(placements: dict[str, Any], first: int, last: int, path: str | None, then: str) -> None:
    """Steps of layers that are cut so on all ranks, or whole without a process group."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(SHAPE, generator=generator) for name in placements}
    values = {name: (value + (path is not None)).bfloat16() for name, value in values.items()}

    def cut(name: str, value: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(value, make_mesh(None), placements[name]) if placements[name] else value

    layers = {name: torch.nn.Parameter(cut(name, value)) for name, value in values.items()}
    options = KEPT["kahan and state"].options
    optimizer = LAMB(layers.items(), lr=0.01, implementation="eager", rounding_seed=1, **options)
    if path is not None:
        load_optimizer_state(optimizer, path)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step + 1)
        for name, parameter in layers.items():
            parameter.grad = cut(name, torch.randn(SHAPE, generator=generator).bfloat16())
        optimizer.step()
    save_optimizer_state(optimizer, then)


@pytest.mark.parametrize("world_size", [2])
def test_dtensors_cut_along_other_dimensions(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    names = ("rows", "columns", "whole")
    before, after = (dict(zip(names, order, strict=True)) for order in (PLACEMENTS, PLACEMENTS[1:] + PLACEMENTS[:1]))
    middle, end = str(tmp_path / "middle"), str(tmp_path / "end")
    pool.run(train_cut, before, 0, 3, None, middle)
    pool.run(train_cut, after, 3, 6, middle, end)
    train_cut(dict.fromkeys(names), 0, 6, None, str(tmp_path / "alone"))
    assert_same(end, tmp_path / "alone")


def train_redundantly(kept: str, first: int, last: int, path: str | None, then: str) -> dict[str, torch.Tensor]:
    """With ZeroRedundancyOptimizer, whose ranks have whole layers each."""
    case = make_case("lamb", "ddp", kept)
    model = Model(case).to(KEPT[kept].weights)
    model.load(initial_weights(replace(case, seed=0 if path is None else 7)))
    wrapped = DistributedDataParallel(model)
    parameters = [leaf.weight for leaf in model.leaves.values()]
    optimizer = ZeroRedundancyOptimizer(parameters, LAMB, lr=0.05, weight_decay=0.1, **KEPT[kept].options)
    optimizer.optim.implementation = "eager"
    if path is not None:
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for gradients in mean_gradients(case)[first:last]:
        wrapped(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, then)
    dist.barrier()
    return {name: leaf.weight.detach().clone() for name, leaf in model.leaves.items()}


@pytest.mark.parametrize("kept", ROUNDED)
@pytest.mark.parametrize("world_size", [2])
def test_zero_redundancy_optimizer(pool: WorkerPool, tmp_path: Path, kept: str, world_size: int) -> None:
    middle, end = str(tmp_path / "middle"), str(tmp_path / "end")
    straight_on = pool.run(train_redundantly, kept, 0, STEPS, None, end)[0]
    pool.run(train_redundantly, kept, 0, SAVED, None, middle)
    for weights in pool.run(train_redundantly, kept, SAVED, STEPS, middle, end):
        assert all(torch.equal(value, straight_on[name]) for name, value in weights.items())
