"""TrustRatio around other optimizers equals one process, under every wrapper and in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ..base_optimizers import BASES
from . import fsdp_runs
from .cases import Case, run_case
from .exactness import MODEL, assert_exact, two_groups, worst_error
from .fsdp_runs import Setup
from .pool import WorkerPool

STAGES: tuple[str | int, ...] = ("ddp", 0, 1, 2, 3)


def make_case(name: str, stage: str | int, **changes: Any) -> Case:
    return Case(name, MODEL, stage, two_groups(name, **changes.pop("options", {})), **changes)


def run_exact(pool: WorkerPool, case: Case) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = pool.run(run_case, case)
    assert_exact(case, answers)
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BASES)
def test_weights_and_ratios_equal_one_process(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    answers = run_exact(pool, make_case(name, stage))
    calls = 2 if stage in (1, 2, 3) else 1
    for answer in answers:
        # The first step also proves the layout, and sees that somebody has a gradient.
        expected = 1 if stage in (1, 2, 3) and world_size > 1 else 0
        assert set(answer["all_reduces"][calls:]) == {expected}
        assert answer["collectives"] == answer["all_reduces"]
