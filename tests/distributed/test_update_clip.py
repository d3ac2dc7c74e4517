"""StableAdamW and update_clip: the RMS of whole layers, under what training does besides, and naive RMS's caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from trustratio.optimizers.kernels.interface import LocalSums
from trustratio.optimizers.stepping.step import Step

from . import fsdp_runs
from .cases import Case, LayerSpec, run_case
from .exactness import BOUND, MODEL, assert_exact, worst_error
from .pool import CaseFailed, WorkerPool
from .test_exactness import BF16, make_case, run_exact

CLIPPED: list[tuple[str, dict[str, Any]]] = [
    ("stableadamw", {}),
    ("lamb", {"update_clip": 0.7, "betas": (0.9, 0.9)}),
]
both = pytest.mark.parametrize(("name", "options"), CLIPPED, ids=[name for name, _ in CLIPPED])

Totals = dict[str, torch.Tensor]


def of_local_part(step: Step, c: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    return local / share(step)


def by_local_count(step: Step, c: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    return c / share(step)


def of_local_sum(step: Step, c: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    return local


def largest_sum(step: Step, c: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    return step.layout.reduce(local.unsqueeze(0), largest=True)[0]


NAIVE = {"part": of_local_part, "count": by_local_count, "sum": of_local_sum, "largest": largest_sum}


def share(step: Step) -> torch.Tensor:
    """Of each layer's elements that lie here, as a fraction."""
    counts = torch.zeros(len(step.layout.layers), dtype=torch.float64)
    for shard in step.layout.shards:
        counts[shard.layer] += shard.length
    return counts.clamp(min=1) / torch.tensor([layer.numel for layer in step.layout.layers])


def run_naive(case: Case, how: str) -> dict[str, Any]:
    """Runs on every rank."""
    original: Callable[..., Totals] = Step._reduce

    def reduce(self: Step, stages: Mapping[int, Any], local_sums: Mapping[int, LocalSums]) -> Totals:
        totals = original(self, stages, local_sums)
        local = torch.zeros_like(totals["c"])
        for group, sums in local_sums.items():
            layers = self.groups[group].layers
            local[layers.start : layers.stop] = sums.of_layers[list(stages[group].sum_sizes).index("c")]
        return {**totals, "c": NAIVE[how](self, totals["c"], local)}

    Step._reduce = reduce  # type: ignore[method-assign]
    try:
        return run_case(case)
    finally:
        Step._reduce = original  # type: ignore[method-assign]


@both
@pytest.mark.parametrize("how", NAIVE)
@pytest.mark.parametrize(("world_size", "stage"), [(2, 1), (3, 3)])
def test_naive_sums_are_caught(
    pool: WorkerPool, name: str, options: dict[str, Any], how: str, stage: int, world_size: int
) -> None:
    # "eager" steps whole layers by a reduction too.
    whole, sharded = (
        make_case(name, stage, options=options, constructor={"implementation": "eager"}) for stage in ("ddp", stage)
    )
    assert error_of_naive(pool, whole, how) < BOUND
    assert not error_of_naive(pool, sharded, how) < 1e-3


def error_of_naive(pool: WorkerPool, case: Case, how: str) -> float:
    """Infinite where ranks come to see at the first step that their ratios differ."""
    try:
        answers = pool.run(run_naive, case, how)
    except CaseFailed as error:
        assert "have taken different steps" in str(error)  # noqa: PT017
        return math.inf
    return max(worst_error(case, answer["weights"])[0] for answer in answers)


@both
@pytest.mark.parametrize("stage", ["ddp", 1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_clip_is_exact(
    pool: WorkerPool, name: str, options: dict[str, Any], stage: str | int, world_size: int
) -> None:
    answers = run_exact(pool, make_case(name, stage, options=options))
    ratios = [ratio for step in answers[0]["ratios"] for ratio in step.values()]
    if name == "stableadamw":
        assert max(ratios) == 1.0
        assert min(ratios) < 0.6
    if stage != "ddp":
        assert set(answers[0]["all_reduces"][2:]) == {1}


@both
@pytest.mark.parametrize("stage", ["ddp", 1, 2, 3])
@pytest.mark.parametrize("world_size", [3])
def test_accumulation_and_the_wrappers_clipping(
    pool: WorkerPool, name: str, options: dict[str, Any], stage: str | int, world_size: int
) -> None:
    clipping = 0.0 if stage == "ddp" else 0.5
    run_exact(pool, make_case(name, stage, accumulation=3, clipping=clipping, options=options))


@both
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_bf16_masters(pool: WorkerPool, name: str, options: dict[str, Any], stage: int, world_size: int) -> None:
    run_exact(pool, make_case(name, stage, dtype="bf16", spread=0.0, options=options))


@both
@pytest.mark.parametrize("world_size", [2])
def test_bf16_optimizer(pool: WorkerPool, name: str, options: dict[str, Any], world_size: int) -> None:
    config = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    run_exact(pool, make_case(name, 1, dtype="bf16", spread=0.0, config=config, options=options))


@both
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_loss_scales_and_skipped_steps(
    pool: WorkerPool, name: str, options: dict[str, Any], stage: int, world_size: int
) -> None:
    config = {"fp16": {"enabled": True, "loss_scale": 16}}
    case = make_case(name, stage, dtype="fp16", spread=0.0, overflow=(1,), config=config, options=options)
    answers = run_exact(pool, case)
    assert set(answers[0]["step_counts"].values()) == {case.steps - 1}


@both
@pytest.mark.parametrize("stage", ["ddp", 1, 2])
@pytest.mark.parametrize("world_size", [3])
def test_layers_without_gradient_frozen_and_tied(
    pool: WorkerPool, name: str, options: dict[str, Any], stage: str | int, world_size: int
) -> None:
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale"), 4: ("dense",)}
    layers = (*MODEL, LayerSpec("frozen", (5, 5), frozen=True), LayerSpec("decoder", (37, 11), tied_to="embedding"))
    answers = run_exact(pool, make_case(name, stage, layers, skipped=skipped, options=options))
    assert answers[0]["ratios"][0]["norm"] == 1.0


@both
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [4])
def test_padding_and_ranks_that_hold_nothing(
    pool: WorkerPool, name: str, options: dict[str, Any], stage: int, world_size: int
) -> None:
    tiny = (LayerSpec("a", (1, 2)), LayerSpec("b", (1,), group=1))
    answers = run_exact(pool, make_case(name, stage, tiny, poison=True, options=options))
    assert all(answer["padding_is_nan"] for answer in answers)


@both
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_checkpoint_continues_bit_for_bit(
    pool: WorkerPool, name: str, options: dict[str, Any], stage: int, world_size: int, tmp_path: Any
) -> None:
    straight = make_case(name, stage, options=options)
    one = pool.run(run_case, straight)
    other = pool.run(run_case, make_case(name, stage, options=options, save_after=2, folder=str(tmp_path)))
    assert_exact(straight, one)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(w, b["weights"][layer]) for layer, w in a["weights"].items())
        assert a["ratios"][2:] == b["ratios"]


@both
@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp2(pool: WorkerPool, name: str, options: dict[str, Any], world_size: int) -> None:
    case = fsdp_runs.make_case(name, options=options)
    answers = fsdp_runs.run_exact(pool, case, fsdp_runs.Setup())
    assert answers[0]["collectives"][1:] == [1] * (case.steps - 1)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_groups_that_differ_in_what_they_measure(pool: WorkerPool, stage: int, world_size: int) -> None:
    """The second group, of biases and norms, is not clipped."""
    case = make_case("lamb", stage, options={"betas": (0.9, 0.9)})
    first, second = case.groups
    groups = ({**first, "update_clip": 0.5}, {**second, "update_clip": None})
    run_exact(pool, Case("lamb", MODEL, stage, groups))
