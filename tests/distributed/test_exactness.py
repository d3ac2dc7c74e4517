"""Any sharding equals one process: every optimizer against the float64 reference, on every backend and rank count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trustratio.optimizers import OPTIMIZERS

from .cases import Case, LayerSpec, initial_weights, mean_gradients, run_case
from .exactness import MODEL, NOISE, STEPS, assert_exact, expected, two_groups, worst_error
from .pool import WorkerPool

STAGES: tuple[str | int, ...] = ("ddp", 0, 1, 2, 3)
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
OWN_OPTIMIZER = {"zero_force_ds_cpu_optimizer": False}


def make_case(name: str, stage: str | int, layers: tuple[LayerSpec, ...] = MODEL, **changes: Any) -> Case:
    options = changes.pop("options", {})
    changes.setdefault("noise", NOISE.get(name, 0.0))
    changes.setdefault("steps", STEPS.get(name, 5))
    return Case(name, layers, stage, two_groups(name, **options), **changes)


def run_exact(pool: WorkerPool, case: Case) -> list[dict[str, Any]]:
    answers = pool.run(run_case, case)
    assert_exact(case, answers)
    return answers


# Every optimizer, stage and rank count ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_weights_and_ratios_equal_one_process(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    case = make_case(name, stage)
    answers = run_exact(pool, case)
    sharded = stage in (1, 2, 3) and world_size > 1
    calls = 2 if stage in (1, 2, 3) else 1
    for answer in answers:
        # The first step also proves the layout, with one more collective.
        entry = OPTIMIZERS[name]
        all_reduces = entry.collectives if sharded else entry.unsharded_collectives if world_size > 1 else 0
        assert set(answer["all_reduces"][calls:]) == {all_reduces}
        if entry.group_statistics != "squares":
            assert answer["collectives"] == answer["all_reduces"]
        assert set(answer["step_counts"].values()) == {case.steps}


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, entry in OPTIMIZERS.items() for options in entry.variants]
)
def test_every_variant(pool: WorkerPool, name: str, options: dict[str, Any], stage: int, world_size: int) -> None:
    run_exact(pool, make_case(name, stage, options=options))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_harness_catches_norms_of_local_tensors(pool: WorkerPool, stage: int, world_size: int) -> None:
    unsharded, sharded = make_case("naive", "ddp"), make_case("naive", stage)
    error, _ = worst_error(unsharded, pool.run(run_case, unsharded)[0]["weights"])
    assert error < 2e-6
    error, _ = worst_error(sharded, pool.run(run_case, sharded)[0]["weights"])
    assert not error < 0.05


# Layouts ------------------------------------------------------------------------------------------------------------

ZERO_OPTIONS = {
    "round robin": ((1, 2), {"round_robin_gradients": True}),
    "alignment": ((1, 2), {"parameter_alignment": True}),
    "round robin and alignment": ((1, 2), {"round_robin_gradients": True, "parameter_alignment": True}),
    "overlap": ((1, 2, 3), {"overlap_comm": True, "contiguous_gradients": True}),
    "small buckets": ((1, 2, 3), {"reduce_bucket_size": 100, "allgather_bucket_size": 100}),
    "no reduce-scatter": ((1, 2), {"reduce_scatter": False}),
    "offload": ((1, 2, 3), OFFLOAD),
    "pinned offload": ((1, 2, 3), {"offload_optimizer": {"device": "cpu", "pin_memory": True}}),
    "sub-groups": ((3,), {"sub_group_size": 100}),
    "sub-groups and offload": ((3,), {"sub_group_size": 100, **OFFLOAD}),
    "parameter offload": ((3,), {"offload_param": {"device": "cpu"}, **OFFLOAD}),
    "persistent parameters": ((3,), {"stage3_param_persistence_threshold": 20}),
}


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [3])
@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        pytest.param(stage, zero, id=f"{name}-{stage}")
        for name, (stages, zero) in ZERO_OPTIONS.items()
        for stage in stages
    ],
)
def test_zero_options(pool: WorkerPool, name: str, stage: int, zero: dict[str, Any], world_size: int) -> None:
    run_exact(pool, make_case(name, stage, zero=zero, config=OWN_OPTIMIZER))


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_zero_init_and_its_uninitialised_padding(pool: WorkerPool, name: str, world_size: int) -> None:
    run_exact(pool, make_case(name, 3, zero_init=True))


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_padding_is_neither_read_nor_written(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    answers = run_exact(pool, make_case(name, stage, poison=True, zero={"parameter_alignment": stage < 3}))
    assert all(answer["padding_is_nan"] for answer in answers)


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_that_hold_only_padding(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    tiny = (LayerSpec("a", (1, 2)), LayerSpec("b", (1,), group=1))
    run_exact(pool, make_case(name, stage, tiny))


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_layer_on_all_ranks(pool: WorkerPool, stage: int, world_size: int) -> None:
    layers = (LayerSpec("wide", (101, 7)), LayerSpec("bias", (3,), group=1))
    run_exact(pool, make_case("lamb", stage, layers))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_tied_and_zero_size_parameters(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    layers = (
        *MODEL,
        LayerSpec("frozen", (5, 5), frozen=True),
        LayerSpec("decoder", (37, 11), tied_to="embedding"),
        *((LayerSpec("empty", (0, 4), frozen=True),) if stage != 3 else ()),
    )
    case = make_case("lamb", stage, layers)
    run_exact(pool, case)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_unused_layers_are_untouched(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    """ZeRO hands over zeros for them."""
    case = make_case("lamb", stage, skipped=dict.fromkeys(range(5), ("dense", "norm")))
    answers = run_exact(pool, case)
    assert answers[0]["step_counts"]["dense"] == 0
    assert torch.equal(answers[0]["weights"]["dense"], initial_weights(case)["dense"])


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", ["ddp", 0, 1, 2])
def test_layers_without_gradient_in_some_steps(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    """Their state, step counts included, must not move in those steps.

    Not on stage 3: DeepSpeed 0.19.8 hands over the gradient of an earlier step there, to any optimizer.
    """
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale")}
    answers = run_exact(pool, make_case("lamb", stage, skipped=skipped))
    assert answers[0]["step_counts"]["dense"] == 3
    assert answers[0]["step_counts"]["embedding"] == 4
    assert answers[0]["step_counts"]["conv"] == 5


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_moved_between_groups_after_construction(pool: WorkerPool, stage: int, world_size: int) -> None:
    case = make_case("lamb", stage, regroup=True)
    moved = tuple(replace(layer, group=1) if layer.name == "conv" else layer for layer in case.layers)
    answers = pool.run(run_case, case)
    assert_exact(replace(case, layers=moved), answers)


@pytest.mark.parametrize("world_size", [2])
def test_names_fall_back_to_deepspeeds(pool: WorkerPool, world_size: int) -> None:
    for stage in (1, 2, 3):
        answer = pool.run(run_case, make_case("lamb", stage, named=False))[0]
        assert "leaves.conv.weight" in answer["ratios"][0]
    assert "0.2" in pool.run(run_case, make_case("lamb", "ddp", named=False))[0]["ratios"][0]


# Training options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [3])
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    run_exact(pool, make_case(name, stage, accumulation=3))


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_wrappers_clipping(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    case = make_case(name, stage, clipping=0.5)
    # DeepSpeed divides by norm + 1e-6, so the reference is off by that much.
    answers = pool.run(run_case, case)
    assert_exact(case, answers, bound=1e-5)


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_masters(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    """Identical gradients on all ranks, so that averaging 16-bit numbers is exact."""
    run_exact(pool, make_case(name, stage, dtype="bf16", spread=0.0))


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bf16_optimizer_steps_all_groups_at_once(pool: WorkerPool, name: str, world_size: int) -> None:
    config = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    answers = run_exact(pool, make_case(name, 1, dtype="bf16", spread=0.0, config=config))
    assert len(answers[0]["collectives"]) == 5
    assert set(answers[0]["collectives"][1:]) == {1 if world_size > 1 else 0}


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_overflow_skips_the_step(pool: WorkerPool, stage: int, world_size: int) -> None:
    # On stage 0 DeepSpeed 0.19.8 divides by the loss scale without having multiplied by it, for any optimizer.
    config = {"fp16": {"enabled": True, "loss_scale": 16 if stage else 1}}
    case = make_case("lamb", stage, dtype="fp16", spread=0.0, overflow=(1,), config=config)
    answers = run_exact(pool, case)
    assert set(answers[0]["step_counts"].values()) == {4.0}


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_max_grad_norm_is_refused_where_the_wrapper_clips(pool: WorkerPool, stage: int, world_size: int) -> None:
    case = make_case("lamb", stage, constructor={"max_grad_norm": 1.0})
    with pytest.raises(AssertionError, match="set gradient_clipping in the DeepSpeed config"):
        pool.run(run_case, case)


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *((name, stage) for name in OPTIMIZERS for stage in (1, 3)),
        *((name, 2) for name in ("lamb", "lars", "novograd", "vrlamb")),
        *((name, 0) for name in ("lamb", "novograd")),
    ],
)
def test_a_checkpoint_continues_bit_for_bit(
    pool: WorkerPool, name: str, stage: int, world_size: int, tmp_path: Any
) -> None:
    straight = make_case(name, stage, steps=6, skipped={1: ("dense",)} if stage < 3 else {})
    resumed = replace(straight, save_after=3, folder=str(tmp_path))
    one, other = pool.run(run_case, straight), pool.run(run_case, resumed)
    for rank, (a, b) in enumerate(zip(one, other, strict=True)):
        for layer, weights in a["weights"].items():
            assert torch.equal(weights, b["weights"][layer]), f"rank {rank}: {layer}"
        assert a["ratios"][3:] == b["ratios"]
        assert a["step_counts"] == b["step_counts"]
        assert [group["weight_decay"] for group in b["groups"]] == [0.1, 0.0]
        assert a["groups"] == b["groups"]


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("name", "stage", "data_types"),
    [
        ("lamb", 0, {}),
        ("lamb", 1, {}),
        ("lamb", 2, {}),
        ("lamb", 3, {}),
        ("lamb", 1, {"grad_accum_dtype": "fp32"}),
        ("novograd", 1, {"grad_accum_dtype": "fp32"}),
    ],
)
def test_a_bf16_checkpoint_continues_bit_for_bit(
    pool: WorkerPool, name: str, stage: int, data_types: dict[str, str], world_size: int, tmp_path: Any
) -> None:
    config = {**BF16, "data_types": data_types}
    straight = make_case(name, stage, steps=6, dtype="bf16", spread=0.0, config=config)
    one = pool.run(run_case, straight)
    other = pool.run(run_case, replace(straight, save_after=3, folder=str(tmp_path)))
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(w, b["weights"][layer]) for layer, w in a["weights"].items())


# Random models ------------------------------------------------------------------------------------------------------

shapes = st.one_of(
    st.tuples(st.integers(1, 3000)),
    st.tuples(st.integers(1, 60), st.integers(1, 50)),
    st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 7)),
)


@st.composite
def models(draw: Any) -> tuple[LayerSpec, ...]:
    found = draw(st.lists(st.tuples(shapes, st.integers(0, 1)), min_size=0, max_size=6))
    # One small layer in each group, since DeepSpeed drops empty groups.
    found += [((draw(st.integers(1, 40)),), 0), ((draw(st.integers(1, 5)), 2), 1)]
    return tuple(LayerSpec(f"layer{i}", shape, group) for i, (shape, group) in enumerate(found))


@pytest.mark.parametrize("world_size", [2, 3])
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    layers=models(),
    stage=st.sampled_from([1, 2, 3]),
    name=st.sampled_from(["lamb", "lars"]),
    round_robin=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_models(
    pool: WorkerPool,
    layers: tuple[LayerSpec, ...],
    stage: int,
    name: str,
    round_robin: bool,
    seed: int,
    world_size: int,
) -> None:
    zero = {"round_robin_gradients": round_robin} if stage < 3 else {"sub_group_size": 500}
    case = make_case(name, stage, layers, zero=zero, seed=seed, steps=3)
    assert_exact(case, pool.run(run_case, case), along_path=True)


def test_the_reference_sees_what_the_workers_inject() -> None:
    """Guards the guards: gradients differ from step to step and layer to layer."""
    case = make_case("lamb", "ddp")
    first, second = mean_gradients(case)[:2]
    assert not torch.equal(first["dense"], second["dense"])
    weights, ratios = expected(case)
    assert len(ratios) == 5
    assert set(weights) == {layer.name for layer in MODEL}
