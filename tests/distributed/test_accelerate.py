"""Training through accelerate equals one process: every optimizer, DDP and ZeRO 1 to 3, accumulation, statistics."""

from __future__ import annotations

import pytest
import torch

from trustratio.optimizers import LAMB, OPTIMIZERS

from .accelerate_runs import counts_by_itself, harmless, miscounted, offloaded, run_accelerated, scheduled
from .exactness import BOUND, assert_exact, worst_error
from .pool import WorkerPool
from .test_exactness import make_case
from .test_gradient_statistics import assert_norms

STAGES: tuple[str | int, ...] = ("ddp", 1, 2, 3)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_ratios_equal_one_process(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    case = make_case(name, stage, accumulation=2, steps=3)
    answers = pool.run(run_accelerated, case)
    assert_exact(case, answers)
    assert set(answers[0]["step_counts"].values()) == {3.0}


@pytest.mark.parametrize("name", ["lamb", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_accumulation_under_no_sync(pool: WorkerPool, name: str, world_size: int) -> None:
    """Not under DeepSpeed, where accelerate 1.15 steps in every `backward` but those inside `accumulate`."""
    case = make_case(name, "ddp", accumulation=2, steps=3)
    assert_exact(case, pool.run(run_accelerated, case, True))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_group_norms(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    case = make_case("lamb", stage, accumulation=2, steps=3, noise=1.0)
    for answer in pool.run(run_accelerated, case, False, True):
        assert_norms(case, answer["norms"], world_size)


@pytest.mark.parametrize("world_size", [2])
def test_the_comparison_catches_norms_of_shards(pool: WorkerPool, world_size: int) -> None:
    """A LAMB that takes the norms of what its rank holds: exact under DDP, wrong where layers are sharded."""
    whole, sharded = (make_case("naive", stage, accumulation=2, steps=3) for stage in ("ddp", 1))
    error, _ = worst_error(whole, pool.run(run_accelerated, whole)[0]["weights"])
    assert error <= BOUND
    error, _ = worst_error(sharded, pool.run(run_accelerated, sharded)[0]["weights"])
    assert not error < 0.05


@pytest.mark.parametrize("world_size", [2])
def test_an_optimizer_that_offload_would_replace_is_refused(pool: WorkerPool, world_size: int) -> None:
    for answer in pool.run(offloaded, False):
        assert answer.startswith("ReplacedOptimizerError: DeepSpeedCPUAdam"), answer
        assert '"zero_force_ds_cpu_optimizer": false' in answer
    assert pool.run(offloaded, True) == ["LAMB", "LAMB"]


@pytest.mark.parametrize("world_size", [2])
def test_no_false_alarm(pool: WorkerPool, world_size: int) -> None:
    pool.run(harmless)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("optimizer_class", [LAMB, torch.optim.AdamW])
def test_schedules_that_count_updates_are_not_prepared(
    pool: WorkerPool, optimizer_class: type, world_size: int
) -> None:
    """Accelerate steps what it has prepared once per process, which ends our schedules early."""
    for schedule in ("ours", "ours in a chain"):
        for answer in pool.run(scheduled, schedule, optimizer_class):
            assert answer.startswith("ConflictingSettingsError: WarmupPolynomial counts updates"), answer
            assert "2 times per update" in answer
            assert "Leave it out of accelerator.prepare" in answer
    wanted = pytest.approx([0.05, 0.1, 0.1])
    assert pool.run(scheduled, "ours", optimizer_class, prepare=False) == [wanted] * 2
    assert pool.run(scheduled, "ours", optimizer_class, step_scheduler_with_optimizer=False) == [wanted] * 2
    # What torch's do is accelerate's documented way: those who know it give them more steps.
    assert pool.run(scheduled, "torch's", optimizer_class) == [pytest.approx([0.1, 0.1 / 3, 0.1 / 5])] * 2


@pytest.mark.parametrize("world_size", [2])
def test_processes_and_engines_that_accelerate_does_not_see(pool: WorkerPool, world_size: int) -> None:
    if any(pool.run(counts_by_itself)):
        pytest.skip("this accelerate counts the processes")
    for way, load in (("alone", True), ("alone", False), ("wrapped by hand", True), ("DeepSpeed", True)):
        for answer in pool.run(miscounted, way, load):
            assert answer.startswith("ConflictingSettingsError: accelerate counts 1 process, but 2 train"), answer
            assert "use_cpu=True" in answer
            assert ("read all of the data" if load else "a model of its own") in answer
    for answer in pool.run(miscounted, "DeepSpeed, cpu", False):
        assert answer.startswith("ConflictingSettingsError: a DeepSpeed config was given, but accelerate"), answer
        assert "ACCELERATE_USE_CPU=true" in answer
    for way in ("averaged by hand", "wrapped by hand"):
        assert pool.run(miscounted, way, False) == ["LAMB", "LAMB"]
    for way in ("cpu", "DeepSpeed, counted"):
        assert pool.run(miscounted, way, True) == ["LAMB", "LAMB"]
