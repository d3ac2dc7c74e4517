"""Statistics of group gradients on every backend: values, wire, memory, scaling, and models with their own habits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers.gradient_statistics.norms import LOSES_HOOKS

from .cases import Case, LayerSpec, group_gradients, initial_weights, mean_gradients, run_case
from .exactness import MODEL, assert_exact, two_groups, worst_error
from .group_runs import (
    run_measured,
    run_norms,
    run_on_reduced_gradients,
    step_on_tensors_nobody_watched,
    train_network,
    train_with_dropped_batches,
)
from .pool import WorkerPool
from .test_exactness import OWN_OPTIMIZER, STAGES, ZERO_OPTIONS, make_case, run_exact

NAMES = ("clars", "vrsgd", "vrlamb")
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}


def assert_norms(case: Case, found: list[dict[str, tuple[float, ...]]], ranks: int, bound: float = 1e-6) -> None:
    """The norms of every step and layer are those of a float64 reference that sees all gradients."""
    for step, (mean, norms) in enumerate(zip(mean_gradients(case), found, strict=True)):
        for name, g in group_gradients(case, step, mean, ranks * case.accumulation).items():
            flat = g.double().flatten(1)
            wanted = (
                len(flat),
                flat.norm(dim=1).mean().item(),
                flat.square().sum(dim=1).mean().item(),
                flat.mean(dim=0).square().sum().item(),
            )
            assert norms[name] == pytest.approx(wanted, rel=bound), f"step {step}, {name}"


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_norms_for_any_optimizer(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    case = make_case("lamb", stage, accumulation=2, noise=1.0)
    for norms in pool.run(run_norms, case):
        assert_norms(case, norms, world_size)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_are_those_before_loss_scale_and_clipping(pool: WorkerPool, stage: int, world_size: int) -> None:
    """The loss scale doubles every second step: ZeRO divides by the new scale in the step that raises it."""
    fp16 = {"enabled": True, "initial_scale_power": 3, "loss_scale_window": 2, "hysteresis": 1}
    for clipping in (0.0, 0.5):
        case = make_case("lars", stage, dtype="fp16", noise=1.0, spread=0.0, config={"fp16": fp16}, clipping=clipping)
        for norms in pool.run(run_norms, case):
            assert_norms(case, norms, world_size, 1e-6)
    case = make_case("lars", stage, noise=1.0, clipping=0.5)
    for norms in pool.run(run_norms, case):
        assert_norms(case, norms, world_size, 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [3])
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    run_exact(pool, make_case(name, stage, accumulation=3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_wrappers_clipping(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    run_exact(pool, make_case(name, stage, clipping=0.5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    case = make_case(name, stage, dtype="bf16", spread=0.0, clipping=0.5)
    assert_exact(case, pool.run(run_case, case), along_path=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2])
def test_bf16_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    for clipping in (0.0, 0.5):
        case = make_case(name, 1, dtype="bf16", spread=0.0, config=config, clipping=clipping, accumulation=2)
        run_exact(pool, case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_with_skipped_steps(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    # On stage 0 DeepSpeed 0.19.8 divides by the loss scale without having multiplied by it, for any optimizer.
    config = FP16 if stage else {"fp16": {"enabled": True, "loss_scale": 1}}
    for skipped in ((0,), (1, 3)):
        case = make_case(name, stage, dtype="fp16", spread=0.0, overflow=skipped, accumulation=2, config=config)
        answers = pool.run(run_case, case)
        assert_exact(case, answers, along_path=True)
        assert set(answers[0]["step_counts"].values()) == {5.0 - len(skipped)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("stage", "dtype"), [("ddp", "fp32"), (0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_not_finite(pool: WorkerPool, name: str, stage: str | int, dtype: str, world_size: int) -> None:
    """No layer moves in that step, whether or not the wrapper looks at gradients itself."""
    case = make_case(name, stage, dtype=dtype, spread=0.0, overflow=(1,))
    answers = run_exact(pool, case)
    assert set(answers[0]["step_counts"].values()) == {4.0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_statistics_of_reduced_gradients_are_caught(
    pool: WorkerPool, name: str, stage: str | int, world_size: int
) -> None:
    case = make_case(name, stage)
    error, _ = worst_error(case, pool.run(run_on_reduced_gradients, case)[0]["weights"], ranks=world_size)
    assert error > 0.05


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("stage", "drop", "config"),
    [
        (0, "engine", {}),
        (1, "engine", {}),
        (1, "wrapper", {}),
        (1, "wrapper", {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
        (3, "wrapper", {}),
    ],
)
def test_micro_batches_that_deepspeed_drops_do_not_count(
    pool: WorkerPool, stage: int, drop: str, config: dict[str, Any], world_size: int
) -> None:
    wanted = pool.run(train_with_dropped_batches, stage, None, **config)[0]
    for found in pool.run(train_with_dropped_batches, stage, drop, **config):
        for name, norms in wanted.items():
            assert found[name] == pytest.approx(norms, rel=2e-2 if config else 1e-5), name


# Wire and memory ----------------------------------------------------------------------------------------------------

ELEMENTS = sum(w.numel() for w in initial_weights(make_case("lamb", 1)).values())


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_wire_and_memory(pool: WorkerPool, stage: int, accumulation: int, world_size: int) -> None:
    bucket = 64
    case = make_case("vrlamb", stage, accumulation=accumulation)
    answers = pool.run(run_measured, case, bucket)
    assert_exact(case, answers)
    for answer in answers:
        traffic = answer["traffic"]
        # Padding: ZeRO-3's slices are of one size, which counts for layers as small as these.
        passes = case.steps * (1 if stage == 1 else accumulation)
        assert ELEMENTS * passes <= traffic["sent"] <= 1.25 * ELEMENTS * passes
        assert traffic["staged"] <= 1.25 * bucket / 2
        assert traffic["whole"] == (ELEMENTS if stage == 1 else 0)
        assert traffic["partitions"] <= ELEMENTS / world_size + 16 * len(MODEL)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [2, 3])
def test_what_fits_a_bucket_is_sent_once_per_step(pool: WorkerPool, stage: int, world_size: int) -> None:
    case = make_case("vrsgd", stage, accumulation=3)
    answers = pool.run(run_measured, case, 4 * ELEMENTS)
    assert_exact(case, answers)
    assert answers[0]["traffic"]["sent"] <= 1.25 * ELEMENTS * case.steps


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norms_alone_send_and_keep_nothing_more(pool: WorkerPool, stage: int, world_size: int) -> None:
    answer = pool.run(run_measured, make_case("clars", stage), 64)[0]
    assert set(answer["traffic"].values()) == {0}
    assert set(answer["collectives"][2:]) == {1}


# Layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [3])
@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        pytest.param(stage, zero, id=f"{name}-{stage}")
        for name, (stages, zero) in ZERO_OPTIONS.items()
        for stage in stages
    ],
)
def test_zero_options(pool: WorkerPool, stage: int, zero: dict[str, Any], world_size: int) -> None:
    case = make_case("vrlamb", stage, zero=zero, config=OWN_OPTIMIZER, accumulation=2)
    answers = pool.run(run_measured, case, 256)
    assert_exact(case, answers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [3])
def test_zero_init(pool: WorkerPool, name: str, world_size: int) -> None:
    run_exact(pool, make_case(name, 3, zero_init=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_and_tied_parameters(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    layers = (
        *MODEL,
        LayerSpec("frozen", (5, 5), frozen=True),
        LayerSpec("decoder", (37, 11), tied_to="embedding"),
    )
    case = make_case(name, stage, layers)
    # Both users of the tied layer have noise; where it cancels, the ratio magnifies rounding.
    assert_exact(case, pool.run(run_case, case), bound=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_layers_without_gradient(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale")}
    answers = run_exact(pool, make_case(name, stage, skipped=skipped))
    assert answers[0]["step_counts"]["dense"] == 3


@pytest.mark.parametrize("world_size", [4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_that_hold_only_padding(pool: WorkerPool, stage: int, world_size: int) -> None:
    run_exact(pool, make_case("vrlamb", stage, (LayerSpec("a", (1, 2)), LayerSpec("b", (1,), group=1))))


# Real models --------------------------------------------------------------------------------------------------------


def assert_same_training(found: Any, wanted: Any) -> None:
    for weights, norms in found:
        assert norms.keys() == wanted[1].keys()
        for name, values in wanted[1].items():
            assert norms[name] == pytest.approx(values, rel=1e-3, abs=1e-12), name
        for name, w in wanted[0].items():
            torch.testing.assert_close(weights[name], w, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recompute", [None, "plain", "reentrant"])
def test_a_network_with_activation_checkpointing(
    pool: WorkerPool, name: str, stage: str | int, recompute: str | None, world_size: int
) -> None:
    if LOSES_HOOKS and recompute == "plain":
        pytest.skip("ZeRO-3 has put its linear layers in place of torch's in this process")
    wanted = pool.run(train_network, name, "dense", 1, groups=2 * world_size)[0]
    assert_same_training(pool.run(train_network, name, stage, 2, recompute), wanted)


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
@pytest.mark.parametrize("world_size", [2])
def test_accumulation_without_synchronisation(pool: WorkerPool, name: str, world_size: int) -> None:
    wanted = pool.run(train_network, name, "dense", 1, groups=3 * world_size)[0]
    assert_same_training(pool.run(train_network, name, "ddp", 3, no_sync=True), wanted)


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
@pytest.mark.parametrize("world_size", [2])
def test_a_branch_that_one_rank_leaves_out(pool: WorkerPool, name: str, world_size: int) -> None:
    """Its group gradient is zero, and counts as one."""
    wanted = pool.run(train_network, name, "dense", 1, branch_on=(1,), groups=2 * world_size)[0]
    found = pool.run(train_network, name, "ddp", 2, branch_on=(1,))
    assert found[0][1]["branch.weight"][0] == 4
    assert_same_training(found, wanted)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_built_on_what_the_wrapper_made(pool: WorkerPool, stage: int, world_size: int) -> None:
    for message in pool.run(step_on_tensors_nobody_watched, stage):
        assert "Construct" in message or "construct" in message


def test_noise_differs_between_elements_and_leaves_the_mean() -> None:
    """Guards the guards: noise differs between elements, and its mean is the injected gradient."""
    case = Case("vrsgd", MODEL, "ddp", two_groups("vrsgd"), noise=6.0)
    mean = mean_gradients(case)[0]
    groups = group_gradients(case, 0, mean, 4)["dense"].double()
    assert ((groups.mean(0) - mean["dense"]).abs().max() / mean["dense"].abs().max()).item() < 1e-6
    ratio = mean["dense"].square() / groups.var(0, unbiased=False)
    assert ratio.max() > 10 * ratio.median()
