"""Measured norms equal those of whole layers in float64, under every wrapper, with one all-reduce per measured step."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import Case
from .exactness import MODEL, two_groups
from .megatron_distributed_runs import CUT_MODEL
from .norms_runs import Wrapped, assert_measured, expected_norms, measure
from .pool import WorkerPool
from .test_exactness import OFFLOAD, OWN_OPTIMIZER

TORCH = ({"lr": 0.05, "weight_decay": 0.1}, {"lr": 0.05, "weight_decay": 0.0})
OPTIMIZERS = ("torch.AdamW", "torch.SGD", "lamb")

SHARDINGS: dict[str, tuple[Wrapped, str | int, dict[str, Any]]] = {
    "ddp": (Wrapped(), "ddp", {}),
    "ZeRO-0": (Wrapped(outermost=True), 0, {}),
    "ZeRO-1": (Wrapped(outermost=True), 1, {}),
    "ZeRO-1 inner": (Wrapped(), 1, {"zero": {"round_robin_gradients": True}}),
    "ZeRO-2": (Wrapped(outermost=True, with_model=False), 2, {}),
    "ZeRO-2 offload": (Wrapped(outermost=True), 2, {"zero": OFFLOAD, "config": OWN_OPTIMIZER}),
    "ZeRO-3": (Wrapped(outermost=True), 3, {}),
    "ZeRO-3 sub-groups": (Wrapped(with_model=False), 3, {"zero": {"sub_group_size": 60}}),
    "ZeRO-3 Init": (Wrapped(outermost=True), 3, {"zero_init": True}),
    "fsdp1": (Wrapped("fsdp1"), "fsdp1", {}),
    "fsdp1 units": (Wrapped("fsdp1", {"units": True, "early": True}, with_model=False), "fsdp1", {}),
    "fsdp2": (Wrapped("fsdp2"), "fsdp", {}),
    "fsdp2 swapped": (Wrapped("fsdp2", {"units": True, "wrap": "swap"}, with_model=False), "fsdp", {}),
    "megatron": (Wrapped("megatron", outermost=True), "megatron", {}),
    "megatron inner": (Wrapped("megatron", with_model=False), "megatron", {}),
    "redundancy": (Wrapped("redundancy", outermost=True), "redundancy", {}),
    "redundancy inner": (Wrapped("redundancy", with_model=False), "redundancy", {}),
}


def make_case(name: str, stage: str | int, layers: Any = MODEL, **changes: Any) -> Case:
    groups = TORCH if name.startswith("torch.") else two_groups(name)
    return Case(name, layers, stage, groups, **{"steps": 3, **changes})


def measured(pool: WorkerPool, case: Case, wrapped: Wrapped, **options: Any) -> list[dict[str, Any]]:
    """The answers of all ranks, which are the same."""
    answers = pool.run(measure, case, wrapped, **options)
    for answer in answers[1:]:
        assert answer["records"] == answers[0]["records"], "ranks disagree"
    return answers


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_norms_are_those_of_whole_layers(pool: WorkerPool, sharding: str, name: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case(name, stage, **changes)
    answers = measured(pool, case, wrapped)
    for record, wanted in zip(answers[0]["records"], expected_norms(case), strict=True):
        assert_measured(record, wanted)
    assert [record["step"] for record in answers[0]["records"]] == answers[0]["measured"] == [1, 2, 3]


@pytest.mark.parametrize("world_size", [2])
def test_megatron_parts(pool: WorkerPool, world_size: int) -> None:
    for wrapped in (Wrapped("tensor"), Wrapped("megatron", {"tensor_parallel": 2}, outermost=True)):
        case = make_case("torch.AdamW", "tensor", CUT_MODEL)
        answers = measured(pool, case, wrapped)
        for record, wanted in zip(answers[0]["records"], expected_norms(case), strict=True):
            assert_measured(record, wanted)
