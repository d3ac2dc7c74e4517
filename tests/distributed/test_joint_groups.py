"""Groups that differ in learning rate, weight decay and `adapt` are stepped together, however layers are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trustratio.optimizers import OPTIMIZERS

from . import test_fsdp
from .cases import Case, run_case
from .exactness import MODEL, NOISE, STEPS, LayerSpec, assert_exact, two_groups
from .pool import WorkerPool

FOUR_GROUPS: tuple[LayerSpec, ...] = tuple(
    replace(layer, group=group) for layer, group in zip(MODEL, (0, 1, 1, 2, 3, 3), strict=True)
)


def case_of_groups(name: str, stage: str | int) -> Case:
    """Three that are joined where they are stepped by one call, and a last one with other betas or momentum."""
    (base, _), own = two_groups(name), {"momentum": 0.5} if name == "lars" else {"betas": (0.8, 0.95)}
    groups: tuple[dict[str, Any], ...] = (
        base,
        {**base, "lr": 0.7 * base["lr"], "weight_decay": 0.0},
        {**base, "lr": 0.5 * base["lr"], "adapt": True},
        {**base, **own},
    )
    return Case(name, FOUR_GROUPS, stage, groups, noise=NOISE.get(name, 0.0), steps=STEPS.get(name, 5))


def train(case: Case) -> dict[str, Any]:
    """Runs on every rank."""
    return test_fsdp.run_case(case, test_fsdp.Setup()) if case.stage == "fsdp" else run_case(case)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["ddp", 1, 2, 3, "fsdp"])
@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "vrlamb"])
def test_joined_groups_equal_the_reference(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    case = case_of_groups(name, stage)
    answers = pool.run(train, case)
    assert_exact(case, answers)
    if stage == "fsdp" and not OPTIMIZERS[name].group_statistics:
        for answer in answers:
            assert set(answer["all_reduces"][2:]) == {OPTIMIZERS[name].collectives}
