"""Extrapolated training equals its float64 reference under every wrapper, and the weights come back to the bit."""

from __future__ import annotations

from typing import Any

import pytest

from ..reference import relative_error
from .cases import Case, initial_weights
from .exactness import BOUND
from .extrapolation_runs import Plan, reference, train
from .norms_runs import Wrapped
from .pool import WorkerPool
from .test_exactness import OFFLOAD
from .test_layer_norms import make_case

UNITS = {"units": True, "options": {"reshard_after_forward": False}}

SHARDINGS: dict[str, tuple[Wrapped, str | int, dict[str, Any]]] = {
    "dense": (Wrapped(), "dense", {}),
    "ddp": (Wrapped(), "ddp", {}),
    "ZeRO-0": (Wrapped(), 0, {}),
    "ZeRO-1": (Wrapped(), 1, {}),
    "ZeRO-2": (Wrapped(), 2, {}),
    "ZeRO-2 offload": (Wrapped(), 2, {"zero": OFFLOAD, "config": {"zero_force_ds_cpu_optimizer": False}}),
    "ZeRO-3": (Wrapped(), 3, {}),
    "ZeRO-3 sub-groups": (Wrapped(), 3, {"zero": {"sub_group_size": 60}}),
    "fsdp1": (Wrapped("fsdp1"), "fsdp1", {}),
    "fsdp2": (Wrapped("fsdp2"), "fsdp", {}),
    "fsdp2 units": (Wrapped("fsdp2", UNITS), "fsdp", {}),
    "megatron": (Wrapped("megatron"), "megatron", {}),
}


def assert_extrapolated(case: Case, plan: Plan, answers: list[dict[str, Any]]) -> None:
    ranks = 1 if case.stage == "dense" else len(answers)
    wanted, moved = reference(case, plan, ranks)
    initial = initial_weights(case)
    for rank, answer in enumerate(answers):
        for name, w in wanted.items():
            error = relative_error(answer["weights"][name], w, initial[name])
            assert error <= BOUND, f"{name}: relative error of the weight change {error:.2e}"
            if plan.contexts != "attached" and (plan.direction != "own_gradient" or rank == 0):
                there = relative_error(answer["moved"][name], moved[name], initial[name])
                assert there <= BOUND, f"{name}: relative error of the move {there:.2e}"
        assert answer["comes_back"]


@pytest.mark.parametrize("contexts", ["each", "attached"])
@pytest.mark.parametrize("name", ["lamb", "torch.AdamW"])
@pytest.mark.parametrize("direction", ["gradient", "noise"])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_it_equals_its_reference(
    pool: WorkerPool, sharding: str, direction: str, name: str, contexts: str, world_size: int
) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case(name, stage, **{"steps": 4, **changes})
    plan = Plan(direction, contexts=contexts, named=name.startswith("torch."))
    assert_extrapolated(case, plan, pool.run(train, case, wrapped, plan))
