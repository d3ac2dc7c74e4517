"""Samples of the curvature beside checkpoints, schedulers, autocast and `Extrapolation`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from .cases import Case
from .curvature_mishaps_runs import (
    extrapolate_in_a_curvature_trainer,
    in_one_region_of_autocast,
    lose_a_sample,
    skip_a_batch,
)
from .pool import CaseFailed, WorkerPool
from .test_curvature import make_case


def every(case: Case, interval: int) -> Case:
    return replace(case, groups=tuple({**group, "interval": interval} for group in case.groups))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_the_engines_scheduler_where_a_sample_is_wanted(
    pool: WorkerPool, stage: int, world_size: int, tmp_path: Any
) -> None:
    for answer in pool.run(skip_a_batch, every(make_case("curvature_sgd", stage), 1), str(tmp_path)):
        rate = answer["rate"]
        assert answer["told"][0] == rate
        assert answer["after"] == (rate / 2, 2, 2)
        assert answer["loaded"] == (rate, 1, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_lost_sample_is_wanted_after_a_resume_too(
    pool: WorkerPool, stage: int, world_size: int, tmp_path: Any
) -> None:
    case = every(make_case("curvature_adamw", stage), 3)
    straight, resumed = pool.run(lose_a_sample, case, None), pool.run(lose_a_sample, case, str(tmp_path))
    for one, other in zip(straight, resumed, strict=True):
        assert one["wanted"]
        assert other["wanted"]
        assert all(one["weights"][name].equal(w) for name, w in other["weights"].items())


@pytest.mark.parametrize("what", ["curvature", "extrapolation"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2 kept"])
@pytest.mark.parametrize("world_size", [2])
def test_a_step_within_one_region_of_autocast(pool: WorkerPool, wrapper: str, what: str, world_size: int) -> None:
    for apart, together in pool.run(in_one_region_of_autocast, wrapper, what):
        assert together == apart
        assert len(set(apart)) == len(apart)


@pytest.mark.parametrize("world_size", [2])
def test_extrapolation_in_a_curvature_trainer_is_refused(pool: WorkerPool, world_size: int, tmp_path: Any) -> None:
    with pytest.raises(CaseFailed, match="Extrapolation cannot go around CurvatureAdamW, which takes samples"):
        pool.run(extrapolate_in_a_curvature_trainer, str(tmp_path))
