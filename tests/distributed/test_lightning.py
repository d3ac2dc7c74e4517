"""Lightning's strategies take the steps of one process, by whatever loop; what they would get wrong is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch", minversion="2.5")

from trustratio.optimizers import OPTIMIZERS

from ..reference import relative_error
from .exactness import BOUND
from .lightning_runs import Run, ThreeBatches, refusal, resumed, train, train_plainly
from .pool import WorkerPool

OPTIONS: dict[str, dict[str, Any]] = {
    "lamb": {"lr": 0.05, "weight_decay": 0.1},
    "lars": {"lr": 2.0, "trust_coefficient": 0.02, "weight_decay": 0.1},
    "clars": {"lr": 2.0, "trust_coefficient": 0.02, "weight_decay": 0.1},
    "vrlamb": {"lr": 0.05, "weight_decay": 0.1},
}
STAGES: tuple[str | int, ...] = ("ddp", "fsdp1", "fsdp2", 0, 1, 2, 3)
ALL_REDUCES: dict[str | None, dict[str | int, int]] = {
    None: {"ddp": 0, 0: 0, "sharded": 1},
    "norms": {"ddp": 1, 0: 1, "fsdp2": 2, "sharded": 1},
    "squares": {"ddp": 2, 0: 2, "fsdp2": 3, "sharded": 2},
}
"""Of one step, by what is collected of single micro-batches: where layers are whole, under FSDP2, under the others."""

two_ranks = pytest.mark.parametrize("world_size", [2])
each_stage = pytest.mark.parametrize("stage", STAGES)


def run_of(stage: str | int, optimizer: str = "lars", **changes: Any) -> Run:
    return Run(stage, optimizer, OPTIONS[optimizer], **changes)


def assert_like_one_process(run: Run, answers: list[dict[str, Any]]) -> None:
    """Weights on every rank, and the ratios of every step."""
    plain = train_plainly(run, len(answers))
    for answer in answers:
        for name, start in plain["start"].items():
            error = relative_error(answer["weights"][name], plain["weights"][name], start)
            assert error <= BOUND, f"{name}: relative error of the weight change {error:.2e}"
        assert answer["ratios"] == [pytest.approx(wanted, rel=BOUND) for wanted in plain["ratios"]]


def no_statistics(stage: str | int, optimizer: str) -> bool:
    return stage == "fsdp1" and OPTIMIZERS[optimizer].group_statistics is not None


@pytest.mark.parametrize("world_size", [2, 3])
@each_stage
@pytest.mark.parametrize("optimizer", OPTIONS)
def test_accumulated_steps(pool: WorkerPool, optimizer: str, stage: str | int, world_size: int, tmp_path: Any) -> None:
    run = run_of(stage, optimizer, accumulation=2)
    if no_statistics(stage, optimizer):
        for error, steps in pool.run(refusal, run, tmp_path):
            assert "FSDP1 makes it for whole flat parameters: not supported. Use FSDP2 (fully_shard), DDP" in error
            assert steps == 0
        return
    answers = pool.run(train, run, tmp_path)
    assert_like_one_process(run, answers)
    counts = ALL_REDUCES[OPTIMIZERS[optimizer].group_statistics]
    for answer in answers:  # the first step proves the layout, with more
        assert set(answer["all_reduces"][1:]) == {counts.get(stage, counts["sharded"])}


@two_ranks
@each_stage
@pytest.mark.parametrize("loop", ["manual", "no_sync", "closure"])
@pytest.mark.parametrize("optimizer", ["lars", "clars"])
def test_steps_by_hand(
    pool: WorkerPool, optimizer: str, loop: str, stage: str | int, world_size: int, tmp_path: Any
) -> None:
    config = {"managed_gradient_accumulation": False} if isinstance(stage, int) else {}
    run = run_of(stage, optimizer, loop=loop, accumulation=2, config=config, parts=stage == "fsdp1")
    if no_statistics(stage, optimizer) or (loop == "no_sync" and config):
        pytest.skip("FSDP1 has no statistics, and DeepSpeed adds up by itself")
    assert_like_one_process(run, pool.run(train, run, tmp_path))


@two_ranks
@each_stage
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_steps(pool: WorkerPool, algorithm: str, stage: str | int, world_size: int, tmp_path: Any) -> None:
    clip = {"gradient_clip_val": {"norm": 0.5, "value": 0.05}[algorithm], "gradient_clip_algorithm": algorithm}
    run = run_of(stage, clip=clip)
    if isinstance(stage, int) and algorithm == "value":
        for error, steps in pool.run(refusal, run, tmp_path):  # by Lightning
            assert "DeepSpeed does not support clipping gradients by value" in error
            assert steps == 0
    else:
        assert_like_one_process(run, pool.run(train, run, tmp_path))


@two_ranks
@each_stage
def test_a_schedule_counts_steps_of_several_batches(
    pool: WorkerPool, stage: str | int, world_size: int, tmp_path: Any
) -> None:
    for answer in pool.run(train, run_of(stage, accumulation=2, scheduled=True), tmp_path):
        assert answer["rates"] == pytest.approx([1.0, 2.0, 2.0, 1.75])


@two_ranks
@each_stage
@pytest.mark.parametrize(("accumulation", "batches"), [(1, 2), (2, 4), (2, 3)])
def test_resumed_steps(
    pool: WorkerPool, accumulation: int, batches: int, stage: str | int, world_size: int, tmp_path: Any
) -> None:
    """Exact after a step. Within one gradients are gone: a warning, or an error where batches are counted wrong."""
    run = run_of(stage, accumulation=accumulation)
    problem = "the checkpoint was written after 1 of the 2 batches of a step, and does not have their gradients"
    if batches % accumulation and isinstance(stage, int):
        with pytest.raises(AssertionError, match=f"ConflictingSettingsError: {problem}; DeepSpeed would count from"):
            pool.run(resumed, run, batches, tmp_path)
        return
    answers = pool.run(resumed, run, batches, tmp_path)
    warned = [any(message.startswith(problem) for message in answer["warned"]) for answer in answers]
    assert warned == [bool(batches % accumulation)] * world_size
    if not batches % accumulation:
        plain = train_plainly(run, world_size)
        done = batches // accumulation
        for answer in answers:  # torch steps once to make the state of FSDP2
            assert len(answer["ratios"]) == run.steps - done + (stage == "fsdp2")
            answer["ratios"] = plain["ratios"][:done] + answer["ratios"][done - run.steps :]
        assert_like_one_process(run, answers)


@two_ranks
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_deepspeed_would_make_of_accumulation(
    pool: WorkerPool, stage: int, world_size: int, tmp_path: Any
) -> None:
    """Each is an error on all ranks before the first step, or where nobody can know before, after the first epoch."""
    run = run_of(stage, accumulation=2)
    unmanaged = {"managed_gradient_accumulation": False}
    by_hand = replace(run, loop="manual")
    cases: list[tuple[Run, dict[str, Any], str, int]] = [
        (replace(run, callbacks=()), {}, "divides the loss by accumulate_grad_batches=2, and DeepSpeed", 0),
        (run, {"limit_train_batches": 3}, "an epoch has 3 batches per rank, .* Set limit_train_batches=2 in", 0),
        (run, {"limit_train_batches": 1}, "an epoch has 1 batches per rank, .*: accumulate less", 0),
        (run, {"loader": ThreeBatches, "max_epochs": 2}, "an epoch has 3 batches per rank", 1),
        (replace(run, config=unmanaged), {}, "has DeepSpeed step at every batch, whatever", 0),
    ]
    if stage in (1, 2):
        cases.append((by_hand, {}, f"a second backward pass before the step: ZeRO-{stage} would drop", 0))
    for case, changes, message, taken in cases:
        for error, steps in pool.run(refusal, case, tmp_path, **changes):
            assert steps == taken
            assert re.match(f"ConflictingSettingsError: .*{message}", error), error
    for taken, changes in ((1, {"loader": ThreeBatches}), (0, {"fast_dev_run": True}), (1, {"stop_after": 3})):
        assert pool.run(refusal, run, tmp_path, **changes) == [("", taken)] * world_size  # nothing comes after it
    if stage in (0, 3):  # which add up what comes
        assert_like_one_process(by_hand, pool.run(train, by_hand, tmp_path))


@two_ranks
def test_backward_within_the_forward_of_fsdp1(pool: WorkerPool, world_size: int, tmp_path: Any) -> None:
    for error, steps in pool.run(refusal, run_of("fsdp1", loop="manual"), tmp_path):
        assert error.startswith("ConflictingSettingsError: with manual optimization, training_step() calls backward()")
        assert steps == 0
