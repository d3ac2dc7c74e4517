"""Extrapolated training equals its float64 reference under every wrapper, and the weights come back to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ..reference import relative_error
from .cases import Case, initial_weights
from .exactness import BOUND
from .extrapolation_runs import (
    CURVATURE,
    Plan,
    all_reduces_of_a_context,
    displaced,
    noise_of_dtensors,
    post_local_sgd,
    reference,
    targets,
    train,
    train_by_local_norms,
    train_with_overflow,
    two_workers,
)
from .norms_runs import Wrapped
from .pool import CaseFailed, WorkerPool
from .test_exactness import BF16, OFFLOAD
from .test_layer_norms import make_case

UNITS = {"units": True, "options": {"reshard_after_forward": False}}

FP16 = {"dtype": "fp16", "config": {"fp16": {"enabled": True, "loss_scale": 16.0}}}
SUMS_IN_FP32 = {"dtype": "bf16", "config": {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}}

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
    "fsdp1 NO_SHARD": (Wrapped("fsdp1", {"strategy": "NO_SHARD"}), "fsdp1", {}),
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


@pytest.mark.parametrize(("name", "contexts"), [("lamb", "each"), ("torch.AdamW", "attached")])
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


@pytest.mark.parametrize("contexts", ["each", "all", "attached"])
@pytest.mark.parametrize("direction", ["gradient", "noise"])
@pytest.mark.parametrize("sharding", ["ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_micro_batches_of_a_step_see_the_same_weights(
    pool: WorkerPool, sharding: str, direction: str, contexts: str, world_size: int
) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("lamb", stage, **{"steps": 3, "accumulation": 2, **changes})
    plan = Plan(direction, contexts=contexts, noise="uniform")
    assert_extrapolated(case, plan, pool.run(train, case, wrapped, plan))


@pytest.mark.parametrize("contexts", ["each", "attached"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sharding", ["dense", "ddp", "ZeRO-0", "ZeRO-1"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_move_by_their_own_gradients(
    pool: WorkerPool, sharding: str, accumulation: int, contexts: str, world_size: int
) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("lamb", stage, **{"steps": 4, "accumulation": accumulation, **changes})
    plan = Plan("own_gradient", contexts=contexts)
    answers = pool.run(train, case, wrapped, plan)
    assert_extrapolated(case, plan, answers)
    if stage != "dense" and contexts == "each":
        assert not torch.equal(answers[0]["moved"]["dense"], answers[1]["moved"]["dense"])


@pytest.mark.parametrize("sharding", ["ZeRO-2", "ZeRO-3", "fsdp1", "fsdp1 NO_SHARD", "fsdp2", "megatron"])
@pytest.mark.parametrize("world_size", [2])
def test_ranks_that_have_a_part_have_no_own_gradient(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    with pytest.raises(
        CaseFailed, match=r"has parts of the gradients or the weights on each rank, .* ZeRO-0 or ZeRO-1"
    ):
        pool.run(train, make_case("lamb", stage, **changes), wrapped, Plan("own_gradient"))


@pytest.mark.parametrize("world_size", [2])
def test_layers_that_one_rank_has_are_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="ZeroRedundancyOptimizer has each rank step layers of its own"):
        pool.run(train, make_case("torch.AdamW", "redundancy"), Wrapped("redundancy"), Plan())


@pytest.mark.parametrize("sharding", ["ZeRO-1", "ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize("world_size", [2])
def test_the_gradient_is_the_clipped_one(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("lamb", stage, clipping=1.0, **changes)
    answers = pool.run(train, case, wrapped, Plan())
    assert_extrapolated(case, Plan(), answers)
    with pytest.raises(AssertionError):
        assert_extrapolated(replace(case, clipping=0.0), Plan(), answers)


@pytest.mark.parametrize("sharding", ["dense", "ddp", "ZeRO-1", "ZeRO-2", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_a_layer_without_gradient_does_not_move_by_it(pool: WorkerPool, sharding: str, world_size: int) -> None:
    """Not on stage 3: DeepSpeed 0.19.8 hands over the gradient of an earlier step there."""
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("lamb", stage, skipped={1: ("dense", "bias"), 3: ("conv",)}, **{"steps": 4, **changes})
    assert_extrapolated(case, Plan(), pool.run(train, case, wrapped, Plan()))


@pytest.mark.parametrize(
    ("direction", "stage"),
    [*((name, stage) for name in ("gradient", "noise") for stage in (1, 2, 3)), ("own_gradient", 1)],
)
@pytest.mark.parametrize("contexts", ["each", "attached"])
@pytest.mark.parametrize("world_size", [2])
def test_a_step_that_overflows_leaves_no_trace(
    pool: WorkerPool, stage: int, direction: str, contexts: str, world_size: int
) -> None:
    """In fp16, where the loss scale multiplies gradients: after it the run goes on as one without that step."""
    case = make_case("lamb", stage, steps=4, **FP16)
    plan = Plan(direction, contexts=contexts)
    undisturbed = pool.run(train_with_overflow, case, plan, ())
    disturbed = pool.run(train_with_overflow, case, plan, (2,))
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert all(torch.equal(one["weights"][name], w) for name, w in other["weights"].items())
        assert one["comes_back"]
        assert other["comes_back"]


IN_16_BITS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"ZeRO-{stage}, fp16": ("gradient", stage, FP16) for stage in (1, 2, 3)},
    # Not fp16, in which DeepSpeed 0.19.8 makes gradients too small without ZeRO.
    "FP16_UnfusedOptimizer": ("gradient", 0, {"dtype": "bf16", "config": BF16}),
    "BF16_Optimizer": ("gradient", 1, SUMS_IN_FP32),
    "own, ZeRO-1, fp16": ("own_gradient", 1, FP16),
    "own, BF16_Optimizer": ("own_gradient", 1, SUMS_IN_FP32),
    "own, ZeRO-0, bf16": ("own_gradient", 0, {"dtype": "bf16", "config": BF16}),
}


@pytest.mark.parametrize("of", IN_16_BITS)
@pytest.mark.parametrize("world_size", [2])
def test_the_last_gradient_is_without_the_loss_scale(pool: WorkerPool, of: str, world_size: int) -> None:
    """As near as 16 bits are: what is 16 times too large is far away."""
    direction, stage, changes = IN_16_BITS[of]
    case, plan = make_case("lamb", stage, steps=1, **changes), Plan(direction)
    for rank, answer in enumerate(pool.run(train, case, Wrapped(), plan)):
        assert answer["comes_back"]
        for name, t in targets(case, 0, world_size).items():
            own = direction == "own_gradient"
            gradient = CURVATURE * (initial_weights(case)[name] - (t[rank] if own else t.mean(dim=0)))
            move = answer["weights"][name] - answer["moved"][name].float()
            assert relative_error(move, plan.step_size * gradient, torch.zeros(())) <= 0.02, name


@pytest.mark.parametrize("world_size", [2])
def test_a_loss_scale_that_nobody_tells_is_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="does not tell the loss scale of fp16: use direction="):
        pool.run(train, make_case("lamb", 0, **FP16), Wrapped(), Plan("own_gradient"))


@pytest.mark.parametrize("sharding", ["ZeRO-1", "ZeRO-3", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_noise_by_local_norms_is_caught(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case, plan = make_case("lamb", stage, **changes), Plan("noise")
    answers = pool.run(train_by_local_norms, case, wrapped, plan)
    with pytest.raises(AssertionError, match="relative error"):
        assert_extrapolated(case, plan, answers)


# Two workers, each at its own gradient: f = ½(w₁² + 10 w₂²), a rate of 0.1, a step size of 0.03, from (1, 1).
@pytest.mark.parametrize("world_size", [2])
def test_the_worked_example(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(two_workers)
    assert answers[0]["gradients"][0] == pytest.approx([1.1, 9.8])
    assert answers[1]["gradients"][0] == pytest.approx([0.9, 10.2])
    assert answers[0]["gradients"][1] == pytest.approx([0.867, -2.84])
    assert answers[1]["gradients"][1] == pytest.approx([1.073, -3.16])
    assert answers[0]["gradients"][2] == pytest.approx([0.67699, 3.852])
    assert answers[1]["gradients"][2] == pytest.approx([0.87081, 4.048])
    for answer in answers:
        for found, wanted in zip(answer["weights"], ((0.9, 0.0), (0.803, 0.3), (0.72561, -0.095)), strict=True):
            assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("direction", ["gradient", "noise"])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize("world_size", [4])
def test_replicas_of_shards(pool: WorkerPool, kind: str, direction: str, world_size: int) -> None:
    options = {"mesh": (2, 2)} if kind == "fsdp2" else {"strategy": "HYBRID_SHARD"}
    case = make_case("lamb", "fsdp", steps=3)
    plan = Plan(direction)
    assert_extrapolated(case, plan, pool.run(train, case, Wrapped(kind, options), plan))


@pytest.mark.parametrize(
    ("dimensions", "world_size"), [((0,), 2), ((1,), 2), ((2,), 2), ((0, 1), 4), ((1, 2), 4), ((0, 0), 4)]
)
def test_noise_of_layers_that_a_mesh_cuts(pool: WorkerPool, dimensions: tuple[int, ...], world_size: int) -> None:
    shape = (6, 5, 7)
    weights = torch.arange(210.0, dtype=torch.float64).view(shape)
    wanted = displaced({"weight": weights}, {}, Plan("noise", step_size=0.5), number=0, seed=0)["weight"]
    for found in pool.run(noise_of_dtensors, shape, dimensions):
        assert torch.allclose(found.double(), wanted, rtol=1e-6)


@pytest.mark.parametrize("direction", ["gradient", "own_gradient"])
@pytest.mark.parametrize("world_size", [2])
def test_local_sgd_of_torch(pool: WorkerPool, direction: str, world_size: int) -> None:
    """The synchronous steps are as without it, and after an averaging all ranks have the mean of what they had."""
    plain, local = pool.run(post_local_sgd, False, direction), pool.run(post_local_sgd, True, direction)
    for one, other in zip(plain, local, strict=True):
        assert other[0] == pytest.approx(one[0])
        assert other[1] == pytest.approx(one[1])
        assert other[3] != pytest.approx(one[3])
    assert local[0][2] == local[1][2]  # they have just been averaged
    assert local[0][3] != local[1][3]


@pytest.mark.parametrize("sharding", ["ddp", "ZeRO-1", "ZeRO-3 sub-groups", "fsdp2 units"])
@pytest.mark.parametrize("world_size", [2])
def test_one_all_reduce_for_the_noise_of_all_layers(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("lamb", stage, **changes)
    for direction, wanted in (("noise", int(stage != "ddp")), ("gradient", 0)):
        assert pool.run(all_reduces_of_a_context, case, wrapped, Plan(direction)) == [wanted] * world_size
