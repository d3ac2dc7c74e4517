"""CBLR's statistics, however layers are cut, and how often each is reduced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from . import cases, fsdp_runs
from .cases import Case
from .exactness import MODEL, assert_exact, two_groups
from .pool import WorkerPool

ALL_REDUCES = {"median": 4, "mean": 1, "norm": 1}
SHARDED = (1, 2, 3, "fsdp")
STAGES = ("dense", "ddp", *SHARDED)


def train(case: Case) -> dict[str, Any]:
    """Runs on every rank."""
    return fsdp_runs.run_case(case, fsdp_runs.Setup()) if case.stage == "fsdp" else cases.run_case(case)


def make_case(stage: str | int, statistic: str, **changes: Any) -> Case:
    # Without eps, elements with nearly no gradient have ratios far above all others.
    return Case("cblr", MODEL, stage, two_groups("cblr", lr=0.05, statistic=statistic, eps=0.0), **changes)


@pytest.mark.parametrize("statistic", ["mean", "norm"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_and_ratios_equal_one_process(
    pool: WorkerPool, stage: str | int, statistic: str, world_size: int
) -> None:
    case = make_case(stage, statistic)
    answers = pool.run(train, case)
    assert_exact(case, answers)
    for answer in answers:
        # The first call for each of the two groups proves the layout, with one more.
        assert set(answer["all_reduces"][2:]) == {ALL_REDUCES[statistic] if stage in SHARDED else 0}


@pytest.mark.parametrize("stage", [1, 3, "fsdp"])
@pytest.mark.parametrize("world_size", [2])
def test_groups_with_different_statistics(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    """One has four reductions, the other one."""
    case = make_case(stage, "mean")
    median = {**case.groups[0], "statistic": "median", "adapt": True}
    case = replace(case, groups=(case.groups[0], median))
    answers = pool.run(train, case)
    assert_exact(case, answers)
    if stage == "fsdp":  # one call for both groups
        assert set(answers[0]["all_reduces"][2:]) == {ALL_REDUCES["median"]}


@pytest.mark.parametrize("statistic", ["mean", "norm"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_checkpoint_continues_bit_for_bit(
    pool: WorkerPool, stage: int, statistic: str, world_size: int, tmp_path: Any
) -> None:
    straight = make_case(stage, statistic, steps=4, skipped={1: ("dense",)} if stage == 1 else {})
    one = pool.run(train, straight)
    other = pool.run(train, replace(straight, save_after=2, folder=str(tmp_path)))
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(weights, b["weights"][layer]) for layer, weights in a["weights"].items())
        assert a["ratios"][2:] == b["ratios"]
