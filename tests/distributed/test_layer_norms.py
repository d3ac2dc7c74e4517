"""Measured norms equal those of whole layers in float64, under every wrapper, with one all-reduce per measured step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from .cases import Case, LayerSpec
from .exactness import MODEL, two_groups
from .megatron_distributed_runs import CUT_MODEL
from .norms_runs import Wrapped, assert_measured, expected_norms, measure, measure_local_parts
from .pool import WorkerPool
from .test_exactness import BF16, OFFLOAD, OWN_OPTIMIZER

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


@pytest.mark.parametrize("sharding", ["ZeRO-1", "ZeRO-3", "fsdp1", "fsdp2", "megatron", "redundancy"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_norms_of_local_parts_are_caught(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("torch.AdamW", stage, **changes)
    for answer in pool.run(measure_local_parts, case, wrapped):
        with pytest.raises(AssertionError):
            assert_measured(answer["records"][0], expected_norms(case)[0], bound=0.01)


@pytest.mark.parametrize(
    ("sharding", "every", "wanted"),
    [
        ("ddp", 1, [1, 0, 0]),
        ("ZeRO-1", 1, [1, 1, 1]),
        ("ZeRO-2", 2, [0, 1, 0]),
        ("ZeRO-3 sub-groups", 1, [1, 1, 1]),
        ("ZeRO-3 sub-groups", 3, [0, 0, 1]),
        ("fsdp1", 1, [1, 1, 1]),
        ("fsdp2", 2, [0, 1, 0]),
        ("megatron", 2, [0, 1, 0]),
        ("redundancy", 2, [0, 1, 0]),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_one_all_reduce_per_measured_step(
    pool: WorkerPool, sharding: str, every: int, wanted: list[int], world_size: int
) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("torch.AdamW", stage, **changes)
    answers = measured(pool, case, wrapped, every=every)
    assert answers[0]["collectives"] == wanted
    assert answers[0]["measured"] == [step for step in (1, 2, 3) if step % every == 0]
    for number, record in enumerate(answers[0]["records"], start=1):
        step = number // every * every
        assert record["step"] == step
        if step:
            assert_measured(record, expected_norms(case)[step - 1])
        else:
            assert (record["layers"], record["model"]) == ({}, None)


@pytest.mark.parametrize("world_size", [2])
def test_megatron_parts(pool: WorkerPool, world_size: int) -> None:
    for wrapped in (Wrapped("tensor"), Wrapped("megatron", {"tensor_parallel": 2}, outermost=True)):
        case = make_case("torch.AdamW", "tensor", CUT_MODEL)
        answers = measured(pool, case, wrapped)
        for record, wanted in zip(answers[0]["records"], expected_norms(case), strict=True):
            assert_measured(record, wanted)


SIXTEEN_BITS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO-0 bf16": (0, {"dtype": "bf16"}),
    "ZeRO-1 bf16": (1, {"dtype": "bf16"}),
    "BF16_Optimizer": (1, {"dtype": "bf16", "config": {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}}),
    "ZeRO-2 fp16": (2, {"dtype": "fp16", "config": {"fp16": {"enabled": True, "loss_scale": 128}}}),
    "ZeRO-3 bf16": (3, {"dtype": "bf16"}),
    "ZeRO-0 fp16": (0, {"dtype": "fp16", "config": {"fp16": {"enabled": True, "loss_scale": 1}}}),
}


@pytest.mark.parametrize("sixteen_bits", SIXTEEN_BITS)
@pytest.mark.parametrize("world_size", [2])
def test_master_weights_after_a_clip_of_deepspeed(pool: WorkerPool, sixteen_bits: str, world_size: int) -> None:
    stage, changes = SIXTEEN_BITS[sixteen_bits]
    for limit in (0.0, 0.5, 1e4):
        # FP16_UnfusedOptimizer steps once with zeros to make the state, so decay would count twice.
        case = replace(make_case("torch.SGD", stage, spread=0.0, clipping=limit, **changes), groups=({"lr": 0.5},) * 2)
        answers = measured(pool, case, Wrapped(outermost=True))
        wanted = expected_norms(case, lambda w, g, limit=limit: scale_to(g, limit) if limit else None)
        for record, of_step in zip(answers[0]["records"], wanted, strict=True):
            assert_measured(record, of_step)
            assert record["clipped"] is (limit == 0.5)


def scale_to(gradients: dict[str, torch.Tensor], limit: float) -> None:
    norm = torch.cat([g.reshape(-1) for g in gradients.values()]).norm()
    for g in gradients.values():
        g *= min(1.0, limit / (norm + 1e-6))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_an_overflow_is_no_step(pool: WorkerPool, stage: int, world_size: int) -> None:
    scaler = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    case = make_case(
        "torch.SGD", stage, dtype="fp16", spread=0.0, overflow=(1,), config={"fp16": scaler}, zero={"stage": stage}
    )
    records = measured(pool, case, Wrapped(outermost=True))[0]["records"]
    first, second = expected_norms(case)
    assert [record["step"] for record in records] == [1, 1, 2]
    assert records[0] == records[1]
    assert_measured(records[0], first)
    assert_measured(records[2], second)


@pytest.mark.parametrize("stage", ["ddp", 1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_layers_without_gradient_frozen_tied_and_empty(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    layers = (
        *MODEL,
        LayerSpec("head", (37, 11), tied_to="embedding"),
        LayerSpec("frozen", (4, 4), frozen=True),
        *([LayerSpec("empty", (0, 5))] if stage != 3 else []),  # which DeepSpeed cannot gather
    )
    # ZeRO-3 keeps the last gradient of a layer that has none in a later step.
    skipped = {0: ("dense",), 1: ("dense", "norm") if stage != 3 else ("dense",)}
    case = make_case("lamb", stage, layers, skipped=skipped, accumulation=2)
    answers = measured(pool, case, Wrapped())
    for record, wanted in zip(answers[0]["records"], expected_norms(case), strict=True):
        assert_measured(record, wanted)
        assert record["layers"]["leaves.dense.weight"]["zero_gradients"] == (record["step"] < 3)


@pytest.mark.parametrize("kind", ["case", "redundancy"])
@pytest.mark.parametrize("world_size", [2])
def test_updates_of_whole_matrices_are_what_changed(pool: WorkerPool, kind: str, world_size: int) -> None:
    matrices = tuple(LayerSpec(layer.name, layer.shape) for layer in MODEL if len(layer.shape) == 2)
    case = Case("torch.Muon", matrices, "ddp", ({"lr": 0.05, "weight_decay": 0.1},), steps=3)
    for answer in measured(pool, case, Wrapped(kind)):
        for record, before, after in zip(answer["records"], answer["weights"], answer["weights"][1:], strict=False):
            for name, weight in before.items():
                change = (after[name].double() - weight.double()).norm().item()
                found = record["layers"][name.removeprefix("module.")]["update"]
                assert change > 0
                assert abs(found / change - 1) < 2e-6


REPLICAS = {
    "HSDP": Wrapped("fsdp2", {"mesh": (2, 2)}),
    "FSDP1": Wrapped("fsdp1", {"strategy": "HYBRID_SHARD"}),
}


@pytest.mark.parametrize("sharding", REPLICAS)
@pytest.mark.parametrize("world_size", [4])
def test_replicas_of_shards(pool: WorkerPool, sharding: str, world_size: int) -> None:
    case = make_case("torch.AdamW", "fsdp")
    answers = measured(pool, case, REPLICAS[sharding])
    assert answers[0]["collectives"] == [2, 1, 1]  # at first replicas are compared
    for record, wanted in zip(answers[0]["records"], expected_norms(case), strict=True):
        assert_measured(record, wanted)
