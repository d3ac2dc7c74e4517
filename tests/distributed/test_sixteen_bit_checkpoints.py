"""Runs that keep numbers of 16 bits go on from every kind of checkpoint to the bit, however they are sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .pool import Pools, WorkerPool
from .sixteen_bit_runs import BF16_OPTIMIZER, FP32, KEPT, assert_same, make_case, resume, straight, write

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
