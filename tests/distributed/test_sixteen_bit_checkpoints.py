"""Runs that keep numbers of 16 bits go on from every kind of checkpoint to the bit, under the same sharding and others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

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
    *[("fsdp1", kept, "dcp", {}) for kept in ROUNDED],
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
