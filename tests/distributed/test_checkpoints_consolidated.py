"""The consolidated optimizer state: written under one sharding, read under another, and training goes on exactly."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trustratio.integrations.checkpoints import consolidated as consolidated_state
from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import LAMB, OPTIMIZERS

from .checkpoint_runs import WITHOUT_STATISTICS, Files, assert_continued, make_case, read, read_alone
from .fsdp_runs import make_mesh
from .pool import CaseFailed, WorkerPool

BF16: dict[str, Any] = {"dtype": "bf16", "spread": 0.0}
BF16_OPTIMIZER = {"config": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}}


# From any backend to any other --------------------------------------------------------------------------------------


BETWEEN = (  # written on so many ranks, by this backend; read on so many, by that
    (2, "fsdp", 2, 2),
    (2, 3, 1, "fsdp"),
    (1, "ddp", 2, 3),
    (2, "fsdp", 3, 3),
    (2, "fsdp", 3, "ddp"),
    (2, "ddp", 3, 1),
    (2, 1, 3, "fsdp"),
    (3, 2, 4, "hsdp"),
    (3, 3, 4, 0),
    (3, 0, 4, 2),
)
# Not on three ranks, where averaging 16-bit gradients rounds.
BETWEEN_BF16: tuple[tuple[int, int, int, int, dict[str, Any]], ...] = (
    (2, 3, 1, 1, {}),
    (2, 1, 4, 3, {}),
    (2, 0, 4, 1, BF16_OPTIMIZER),
    (2, 3, 4, 0, {}),
)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [4])
def test_zero_3_on_four_ranks_to_one_process(files: Files, name: str, world_size: int) -> None:
    path = files.get("consolidated", name, world_size, 3)
    case = make_case(name, 1, "dense")
    assert_continued(case, [read_alone(case, path)])


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
@pytest.mark.parametrize(("after", "world_size"), [(4, 2)])
def test_zero_3_on_four_ranks_to_fsdp2_on_two(files: Files, name: str, after: int, world_size: int) -> None:
    path = files.get("consolidated", name, after, 3)
    case = make_case(name, world_size, "fsdp")
    assert_continued(case, files.run(world_size, read, "consolidated", case, path))


@pytest.mark.parametrize("stage", ["fsdp", 2])
@pytest.mark.parametrize(("after", "world_size"), [(4, 2)])
def test_hsdp_to_fewer_ranks(files: Files, stage: str | int, after: int, world_size: int) -> None:
    path = files.get("consolidated", "lamb", after, "hsdp")
    case = make_case("lamb", world_size, stage)
    assert_continued(case, files.run(world_size, read, "consolidated", case, path))


@pytest.mark.parametrize("name", ["lamb", "novograd"])
@pytest.mark.parametrize(("writers", "written", "world_size", "stage"), BETWEEN)
def test_any_backend_to_any_other(
    files: Files, name: str, writers: int, written: str | int, world_size: int, stage: str | int
) -> None:
    path = files.get("consolidated", name, writers, written)
    case = make_case(name, world_size, stage)
    assert_continued(case, files.run(world_size, read, "consolidated", case, path))


@pytest.mark.parametrize(("writers", "written", "world_size", "stage", "changes"), BETWEEN_BF16)
def test_master_weights_of_16_bit_parameters(
    files: Files, writers: int, written: int, world_size: int, stage: int, changes: dict[str, Any]
) -> None:
    """They, and not their 16-bit copies, go on; and the model's parameters are theirs."""
    path = files.get("consolidated", "lamb", writers, written, **BF16)
    case = make_case("lamb", world_size, stage, **BF16, **changes)
    assert_continued(case, files.run(world_size, read, "consolidated", case, path))
    masters = load_file(path)
    for answer in files.run(world_size, read, "consolidated", case, path, 3, 3):
        for layer, weights in answer["weights"].items():
            assert torch.equal(weights, masters[f"weight/leaves.{layer}.weight"].bfloat16().float())


# Positions ----------------------------------------------------------------------------------------------------------

PLACEMENTS: dict[str, tuple[Any, ...]] = {
    "rows": (Replicate(), Shard(0)),
    "columns": (Replicate(), Shard(1)),
    "rows by columns": (Shard(0), Shard(1)),
    "rows twice": (Shard(0), Shard(0)),
    "last dimension": (Shard(2), Replicate()),
    "whole": (Replicate(), Replicate()),
}
SHAPE = (9, 7, 5)


def placed(values: dict[str, torch.Tensor], placements: dict[str, tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    mesh = make_mesh((2, 2))
    return {name: distribute_tensor(value, mesh, placements[name]) for name, value in values.items()}


def whole_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPE, generator=generator) for name in PLACEMENTS}


def save_and_load_placements(path: str) -> None:
    cut = {name: torch.nn.Parameter(value) for name, value in placed(whole_tensors(0), PLACEMENTS).items()}
    optimizer = LAMB(cut.items())
    for number, state in enumerate(optimizer.element_state, start=1):
        for name, value in placed(whole_tensors(number), PLACEMENTS).items():
            optimizer.state[cut[name]][state] = value
    consolidated_state.BATCH_BYTES = 500  # several batches in each layer
    save_optimizer_state(optimizer, path)
    others = dict(zip(PLACEMENTS, reversed(PLACEMENTS.values()), strict=True))
    fresh = {name: torch.nn.Parameter(value) for name, value in placed(whole_tensors(9), others).items()}
    loaded = LAMB(fresh.items())
    load_optimizer_state(loaded, path)
    for name, parameter in fresh.items():
        assert torch.equal(parameter.full_tensor(), whole_tensors(0)[name]), name
        for number, state in enumerate(loaded.element_state, start=1):
            value = loaded.state[parameter][state]
            assert isinstance(value, DTensor)
            assert torch.equal(value.full_tensor(), whole_tensors(number)[name]), name


@pytest.mark.parametrize("world_size", [4])
def test_every_placement(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    path = str(tmp_path / "state")
    pool.run(save_and_load_placements, path)
    stored = load_file(path)
    for name in PLACEMENTS:
        assert torch.equal(stored[f"weight/{name}"], whole_tensors(0)[name]), name
        assert torch.equal(stored[f"exp_avg_sq/{name}"], whole_tensors(2)[name]), name


# Refusals and failures, on all ranks alike --------------------------------------------------------------------------


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """A full disk, as far as a file that grows can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail(what: str, path: str) -> None:
    rank = dist.get_rank()
    shape = (3 + rank, 2) if what == "shapes" else (3, 2)
    weight = torch.full(shape, 1.0 + rank * (what == "replicas"))
    names = ["weight", "weight"] if what == "twice" else ["weight", "bias"]
    layers = [(names[0], torch.nn.Parameter(weight)), (names[1], torch.nn.Parameter(torch.ones(3)))]
    optimizer = LAMB(layers, lr=0.1)
    if what == "disk":
        with files_limited_to(100):
            save_optimizer_state(optimizer, path)
    if what == "one rank's file":
        path = path if rank == 0 else path + "nowhere"
        load_optimizer_state(optimizer, path)
    if what == "one rank's strict":
        load_optimizer_state(optimizer, path, strict=rank == 0)
    if what == "one rank's weights":
        load_optimizer_state(optimizer, path, weights=rank == 0)
    save_optimizer_state(optimizer, path, extra=object() if what == "one rank's extra" and rank else None)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("disk", "could not write .*File too large. A file that was there before is unchanged"),
        ("shapes", r"layer weight has shape \(3, 2\) on one rank and \(4, 2\) on another"),
        ("replicas", "ranks hold different weights of layer weight"),
        ("twice", "two layers are called weight"),
        ("one rank's file", "nowhere cannot be read"),
        ("one rank's strict", "ranks were given different weights=, strict= or verify=: give all"),
        ("one rank's weights", "ranks were given different weights=, strict= or verify=: give all"),
        ("one rank's extra", "extra cannot be written as JSON: a object is neither"),
    ],
)
def test_all_ranks_refuse(pool: WorkerPool, tmp_path: Path, what: str, message: str, world_size: int) -> None:
    path = tmp_path / "state"
    save_optimizer_state(LAMB([("weight", torch.nn.Parameter(torch.ones(3, 2)))]), path)
    before = path.read_bytes()
    with pytest.raises(CaseFailed, match=message) as failure:
        pool.run(fail, what, str(path))
    error = "TypeError: extra" if what == "one rank's extra" else "OptimizerStateError: "
    assert str(failure.value).count(error) >= world_size
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
