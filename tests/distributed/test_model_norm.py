"""SNGM divides by the norm of the whole model's gradient, which under ZeRO only the wrapper knows."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import Case, LayerSpec, run_case
from .exactness import MODEL, assert_exact, two_groups
from .pool import CaseFailed, WorkerPool
from .test_exactness import BF16, OFFLOAD, OWN_OPTIMIZER

ZERO = (1, 2, 3)


def sngm(stage: str | int, layers: tuple[LayerSpec, ...] = MODEL, **changes: Any) -> Case:
    options = changes.pop("options", {})
    return Case("sngm", layers, stage, two_groups("sngm", **options), **changes)


def assert_case_exact(pool: WorkerPool, case: Case) -> None:
    assert_exact(case, pool.run(run_case, case))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("stage", [0, *ZERO])
def test_after_clipping(pool: WorkerPool, stage: int, world_size: int) -> None:
    """With decay, so that a norm taken before clipping shows; 9.0 clips some steps only."""
    for clipping in (0.5, 9.0):
        assert_case_exact(pool, sngm(stage, clipping=clipping))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", ["ddp", 0, *ZERO])
def test_accumulation(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    assert_case_exact(pool, sngm(stage, accumulation=3))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, *ZERO])
def test_bf16(pool: WorkerPool, stage: int, world_size: int) -> None:
    assert_case_exact(pool, sngm(stage, dtype="bf16", spread=0.0, clipping=2.0))


@pytest.mark.parametrize("world_size", [2])
def test_bf16_optimizer_sees_the_whole_model(pool: WorkerPool, world_size: int) -> None:
    config = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    assert_case_exact(pool, sngm(1, dtype="bf16", spread=0.0, clipping=2.0, config=config))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", ZERO)
def test_static_loss_scale(pool: WorkerPool, stage: int, world_size: int) -> None:
    config = {"fp16": {"enabled": True, "loss_scale": 128}}
    for clipping in (0.0, 0.5):
        assert_case_exact(pool, sngm(stage, dtype="fp16", spread=0.0, clipping=clipping, config=config))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, *ZERO])
def test_a_loss_scale_that_grows_and_overflows(pool: WorkerPool, stage: int, world_size: int) -> None:
    """Without decay: DeepSpeed 0.19.8 halves the gradient in steps that double the scale, which SNGM then undoes."""
    scaler = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}
    options = {"weight_decay": 0.0}
    case = sngm(stage, dtype="fp16", spread=0.0, steps=8, overflow=(3,), options=options, config={"fp16": scaler})
    assert_case_exact(pool, case)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", ZERO)
def test_offload(pool: WorkerPool, stage: int, world_size: int) -> None:
    assert_case_exact(pool, sngm(stage, zero=OFFLOAD, config=OWN_OPTIMIZER, clipping=2.0))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", ZERO)
def test_unused_and_tied_layers(pool: WorkerPool, stage: int, world_size: int) -> None:
    layers = (*MODEL, LayerSpec("head", (37, 11), tied_to="embedding"), LayerSpec("frozen", (4, 4), frozen=True))
    unused = dict.fromkeys(range(5), ("dense", "norm"))
    assert_case_exact(pool, sngm(stage, layers, skipped=unused))


@pytest.mark.parametrize("world_size", [3])
def test_several_sub_groups(pool: WorkerPool, world_size: int) -> None:
    assert_case_exact(pool, sngm(3, zero={"sub_group_size": 60}, clipping=2.0))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_wrapper_without_the_norm_is_refused(pool: WorkerPool, stage: int, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=r"set zero_optimization\.compute_grad_norm to true"):
        pool.run(run_case, sngm(stage, zero={"compute_grad_norm": False}))
