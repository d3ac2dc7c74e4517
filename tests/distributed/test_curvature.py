"""Samples of the curvature under every sharding equal those of one process in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ..reference import relative_error
from .cases import Case, initial_weights
from .curvature_runs import (
    Sampled,
    expected,
    forget_the_second_pass,
    leave_the_second_pass,
    overflow_in_the_second_pass,
    sample_with_zero_redundancy,
    train,
    train_plainly,
    train_with_local_sums,
    train_with_trainer,
)
from .exactness import MODEL, assemble
from .pool import CaseFailed, WorkerPool
from .test_exactness import BF16, OFFLOAD

ZERO3 = {"stage3_param_persistence_threshold": 0, "sub_group_size": 200}
# A large move, so that the difference of two gradients is no smaller than they are: a quadratic's is exact.
OPTIONS: dict[str, dict[str, Any]] = {
    "curvature_sgd": {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.05, "interval": 2, "perturbation": 1.0},
    "curvature_adamw": {"lr": 0.3, "weight_decay": 0.05, "interval": 2, "perturbation": 1.0, "cap": 1.0, "eps": 1e-3},
}
SHARDINGS: dict[str, tuple[Sampled, str | int, dict[str, Any]]] = {
    "dense": (Sampled(), "dense", {}),
    "ddp": (Sampled(), "ddp", {}),
    "ZeRO-0": (Sampled(), 0, {}),
    "ZeRO-1": (Sampled(), 1, {}),
    "ZeRO-2": (Sampled(), 2, {}),
    "ZeRO-2 offload": (Sampled(), 2, {"zero": OFFLOAD, "config": {"zero_force_ds_cpu_optimizer": False}}),
    "ZeRO-3": (Sampled(), 3, {}),
    "ZeRO-3 sub-groups": (Sampled(), 3, {"zero": ZERO3}),
    "megatron": (Sampled("megatron"), "megatron", {}),
    "fsdp1": (Sampled("fsdp1"), "fsdp1", {}),
    "fsdp2": (Sampled("fsdp2"), "fsdp", {}),
}


def make_case(name: str, stage: str | int, **changes: Any) -> Case:
    groups = OPTIONS[name], {**OPTIONS[name], "weight_decay": 0.0}
    return Case(name, MODEL, stage, groups, **{"steps": 6, **changes})


def assert_as_expected(
    case: Case, answers: list[dict[str, Any]], bound: float = 2e-6, ratio_bound: float = 2e-6, clip: float | None = None
) -> None:
    weights, ratios = expected(case, len(answers), clip)
    initial = initial_weights(case)
    for answer in answers:
        found = answer["weights"] if case.dtype == "fp32" else assemble(case, answers)
        errors = {name: relative_error(found[name], weights[name], initial[name]) for name in initial}
        assert max(errors.values()) <= bound, errors
        assert answer["ratios"] == answers[0]["ratios"]
    taken = [found for step, found in enumerate(answers[0]["ratios"]) if step not in case.overflow]
    for found, wanted in zip(taken, ratios, strict=True):
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=ratio_bound)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_samples_equal_one_process(pool: WorkerPool, sharding: str, name: str, world_size: int) -> None:
    sampled, stage, changes = SHARDINGS[sharding]
    case = make_case(name, stage, **changes)
    assert_as_expected(case, pool.run(train, case, sampled))


@pytest.mark.parametrize("sharding", ["ZeRO-2", "ZeRO-3 sub-groups", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_samples_in_every_step(pool: WorkerPool, sharding: str, world_size: int) -> None:
    sampled, stage, changes = SHARDINGS[sharding]
    case = make_case("curvature_sgd", stage, **changes)
    case = replace(case, groups=tuple({**group, "interval": 1} for group in case.groups))
    assert_as_expected(case, pool.run(train, case, sampled))


@pytest.mark.parametrize("sharding", ["ZeRO-1", "ZeRO-3 sub-groups", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_sums_of_what_is_here_are_caught(pool: WorkerPool, sharding: str, world_size: int) -> None:
    sampled, stage, changes = SHARDINGS[sharding]
    case = make_case("curvature_sgd", stage, **changes)
    with pytest.raises((AssertionError, KeyError)):
        assert_as_expected(case, pool.run(train_with_local_sums, case, sampled), bound=1e-3, ratio_bound=1e-3)


@pytest.mark.parametrize("sharding", ["ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_accumulated_and_clipped(pool: WorkerPool, sharding: str, world_size: int) -> None:
    """Samples are of what is not clipped, whoever clips; the step is clipped."""
    sampled, stage, changes = SHARDINGS[sharding]
    own = 0.0 if sharding.startswith("ZeRO") else 2.0
    case = make_case("curvature_adamw", stage, accumulation=2, clipping=2.0 - own, **changes)
    answers = pool.run(train, case, replace(sampled, clipping=own or None))
    assert_as_expected(case, answers, bound=1e-5, ratio_bound=1e-5, clip=2.0)
    with pytest.raises(AssertionError):
        assert_as_expected(case, answers, bound=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_16_bits_with_a_loss_scale_and_overflows(pool: WorkerPool, stage: int, world_size: int) -> None:
    """Model weights that are rounded make a sample inexact; the same gradients on all ranks, whose mean is exact."""
    config = {"fp16": {"enabled": True, "loss_scale": 16}}
    case = make_case("curvature_sgd", stage, dtype="fp16", spread=0.0, overflow=(0, 2), config=config)
    answers = pool.run(train, case, Sampled())
    assert_as_expected(case, answers, bound=0.01, ratio_bound=0.01)
    assert answers[0]["steps"] == (case.steps, 2 * case.steps)


@pytest.mark.parametrize("world_size", [2])
def test_bf16_optimizer(pool: WorkerPool, world_size: int) -> None:
    config = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    case = make_case("curvature_sgd", 1, dtype="bf16", spread=0.0, config=config)
    assert_as_expected(case, pool.run(train, case, Sampled()), bound=0.05, ratio_bound=0.05)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_the_engine_counts_a_step_with_a_sample_once(pool: WorkerPool, stage: int, world_size: int) -> None:
    case = make_case("curvature_sgd", stage, steps=4)
    plain = pool.run(train, case, Sampled(scheduled=True, sampled=False))
    for answer, without in zip(pool.run(train, case, Sampled(scheduled=True)), plain, strict=True):
        assert answer["rate"] == without["rate"] == pytest.approx(0.3 / 2**4)
        assert answer["steps"] == without["steps"] == (4, 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_checkpoint_amid_the_averages_continues_bit_for_bit(
    pool: WorkerPool, stage: int, world_size: int, tmp_path: Any
) -> None:
    case = make_case("curvature_adamw", stage)
    straight = pool.run(train, case, Sampled())
    resumed = pool.run(train, case, Sampled(resume=str(tmp_path)))
    for one, other in zip(straight, resumed, strict=True):
        assert one["ratios"][3:] == other["ratios"]
        assert all(one["weights"][name].equal(w) for name, w in other["weights"].items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_forgotten_second_pass_is_refused(pool: WorkerPool, stage: int, world_size: int) -> None:
    for message in pool.run(forget_the_second_pass, make_case("curvature_sgd", stage), Sampled()):
        assert "run the same batch again inside `with optimizer.curvature():`" in message


@pytest.mark.parametrize("sharding", ["ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3 sub-groups", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_an_exception_in_the_second_pass(pool: WorkerPool, sharding: str, world_size: int) -> None:
    sampled, stage, changes = SHARDINGS[sharding]
    case = make_case("curvature_sgd", stage, **changes)
    if isinstance(stage, int):  # whose gradients are gone with the first pass
        assert_as_expected(case, pool.run(leave_the_second_pass, case, sampled))
    else:
        pool.run(leave_the_second_pass, case, sampled)


@pytest.mark.parametrize("sharding", ["dense", "ddp", "ZeRO-3", "fsdp2"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduces(pool: WorkerPool, sharding: str, world_size: int) -> None:
    """Two of a few numbers per layer for a sample, besides that of the step; none where layers are whole."""
    sampled, stage, changes = SHARDINGS[sharding]
    for answer in pool.run(train, make_case("curvature_sgd", stage, **changes), sampled):
        if sharding == "ZeRO-3":  # two groups, so two calls in each step; the first ones prove the layout
            assert answer["all_reduces"][4:] == [1, 1, *([1, 1, 2, 2, 1, 1] * 2)]
        else:
            sharded = sharding == "fsdp2"
            assert answer["all_reduces"][1:] == [sharded] * 5
            assert answer["reduces_in_samples"][1:] == [2 * sharded] * 2


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_an_overflow_in_the_second_pass_alone(pool: WorkerPool, stage: int, world_size: int) -> None:
    config = {"fp16": {"enabled": True, "loss_scale": 16}}
    case = make_case("curvature_sgd", stage, dtype="fp16", spread=0.0, config=config)
    assert_as_expected(case, pool.run(overflow_in_the_second_pass, case, Sampled()), bound=0.01, ratio_bound=0.01)


@pytest.mark.parametrize("world_size", [2])
def test_what_no_sample_can_be_taken_under_is_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(
        CaseFailed, match=r"stage 0 in fp32 clips gradients, by default to 1\.0, and does not tell by what"
    ):
        pool.run(train, make_case("curvature_sgd", 0, clipping=1.0), Sampled())
    with pytest.raises(CaseFailed, match="clips gradients and does not tell by what: set clip_grad in Megatron"):
        pool.run(train, make_case("curvature_sgd", "megatron", clipping=1.0), Sampled("megatron"))
    case = make_case("curvature_sgd", "ddp")
    with pytest.raises(CaseFailed, match="steps other layers on every rank and sends weights in its own step"):
        pool.run(sample_with_zero_redundancy, replace(case, groups=({**case.groups[0], "interval": 1},) * 2))


@pytest.mark.parametrize("stage", ["ddp", 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_the_trainer_takes_samples(pool: WorkerPool, stage: str | int, world_size: int, tmp_path: Any) -> None:
    """As a loop of one's own on one process; fp32 rounds the difference of gradients that are near each other.

    A key's bias has no gradient but for rounding, since softmax takes no notice of it.
    """
    found, plain = pool.run(train_with_trainer, stage, str(tmp_path)), pool.run(train_plainly)
    for answer, expected_of_rank in zip(found, plain, strict=True):
        assert answer["steps"] == 3
        assert answer["samples"] == {2.0}
        ratios = {name: ratio for name, ratio in expected_of_rank["ratios"].items() if "key.bias" not in name}
        assert {name: answer["ratios"][name] for name in ratios} == pytest.approx(ratios, rel=0.01)
        assert len({round(ratio, 6) for ratio in answer["ratios"].values()}) > 10
        for name in ratios:
            of_layer = (answer["weights"], expected_of_rank["weights"], expected_of_rank["start"])
            assert relative_error(*(weights[name] for weights in of_layer)) < 0.01, name


@pytest.mark.parametrize("world_size", [2])
def test_the_trainer_of_another_optimizer_is_refused(pool: WorkerPool, world_size: int, tmp_path: Any) -> None:
    with pytest.raises(
        CaseFailed, match="TypeError: CurvatureTrainer takes samples for CurvatureSGD or CurvatureAdamW"
    ):
        pool.run(train_with_trainer, "ddp", str(tmp_path), "lamb")
