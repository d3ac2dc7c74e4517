"""The consolidated state under FSDP1: written there and read in one process and under another strategy, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state

from . import checkpoint_runs
from .cases import Case
from .checkpoint_runs import SAVED, STEPS, assert_continued, read_alone
from .exactness import worst_error
from .pool import WorkerPool
from .test_fsdp1 import Setup, make_case, running


def write(case: Case, path: str) -> None:
    with running(case, Setup()) as run:
        run.train(0, SAVED)
        save_optimizer_state(run.optimizer, path, model=run.model, extra={"seed": 0})


def read(case: Case, path: str) -> dict[str, Any]:
    with running(replace(case, seed=7), Setup("SHARD_GRAD_OP", units=True)) as run:
        load_optimizer_state(run.optimizer, path, model=run.model)
        run.case = case
        run.train(SAVED, STEPS)
        return run.result()


@pytest.mark.parametrize("name", ["lamb", "novograd"])
@pytest.mark.parametrize("world_size", [2])
def test_both_directions(pool: WorkerPool, tmp_path: Path, name: str, world_size: int) -> None:
    case = make_case(name, steps=STEPS)
    alone = checkpoint_runs.make_case(name, 1, "dense")
    sharded, whole = str(tmp_path / "sharded"), str(tmp_path / "whole")
    pool.run(write, case, sharded)
    assert_continued(alone, [read_alone(alone, sharded)])
    checkpoint_runs.write("consolidated", alone, whole)
    for path in (sharded, whole):
        for answer in pool.run(read, case, path):
            error, layer = worst_error(case, answer["weights"])
            assert error <= 2e-6, f"{layer}: {error:.2e}"
