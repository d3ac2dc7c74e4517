"""AdaBelief and FastAdaBelief under what training does besides: accumulation, 16 bits, skipped layers and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import LayerSpec, run_case
from .exactness import MODEL, STEPS, assert_exact
from .pool import WorkerPool
from .test_exactness import BF16, make_case, run_exact

both = pytest.mark.parametrize("name", ["adabelief", "fastadabelief"])
stages = pytest.mark.parametrize("stage", ["ddp", 1, 2, 3])


@both
@stages
@pytest.mark.parametrize("world_size", [3])
def test_accumulation(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    run_exact(pool, make_case(name, stage, accumulation=3, options={"adapt": None}))


@both
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_bf16_masters(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    run_exact(pool, make_case(name, stage, dtype="bf16", spread=0.0))


@both
@pytest.mark.parametrize("world_size", [2])
def test_bf16_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    config = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    run_exact(pool, make_case(name, 1, dtype="bf16", spread=0.0, config=config))


@both
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_loss_scales_and_skipped_steps(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    config = {"fp16": {"enabled": True, "loss_scale": 16}}
    case = make_case(name, stage, dtype="fp16", spread=0.0, overflow=(1,), config=config)
    answers = run_exact(pool, case)
    assert set(answers[0]["step_counts"].values()) == {case.steps - 1}


@pytest.mark.parametrize("stage", ["ddp", 1, 2])
@pytest.mark.parametrize("world_size", [2])
def test_each_layer_has_its_own_count(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    """Of which the rectified steps begin with the sixth: for some layers here, for others not yet."""
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale"), 4: ("dense",)}
    layers = (*MODEL, LayerSpec("frozen", (5, 5), frozen=True), LayerSpec("decoder", (37, 11), tied_to="embedding"))
    case = make_case("adabelief", stage, layers, skipped=skipped)
    answers = run_exact(pool, case)
    assert answers[0]["step_counts"]["dense"] == STEPS["adabelief"] - 3


@pytest.mark.parametrize("options", [{}, {"rectify": False, "amsgrad": True, "adapt": None}])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_checkpoint_before_the_rectified_steps(
    pool: WorkerPool, stage: int, options: dict[str, Any], world_size: int, tmp_path: Any
) -> None:
    straight = make_case("adabelief", stage, options=options)
    one = pool.run(run_case, straight)
    other = pool.run(run_case, make_case("adabelief", stage, options=options, save_after=4, folder=str(tmp_path)))
    assert_exact(straight, one)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(w, b["weights"][layer]) for layer, w in a["weights"].items())
        assert a["ratios"][4:] == b["ratios"]
