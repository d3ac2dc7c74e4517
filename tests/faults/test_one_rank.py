"""What befalls one rank alone ends all of them, with one sentence and status 3, without help of a launcher."""

from __future__ import annotations

import pytest

from .endings import require_resumable, require_said_once
from .faulty_runs import LAUNCHERS, checkpoints, show, started

ALLOCATOR = r"rank {rank} failed in update 6: out of memory \(.*DefaultCPUAllocator.*\); use a smaller --micro_batch"
BUG = r"rank {rank} failed in update 6, with the exception above: KeyError: 'a bug'"
KILLED = "rank {rank} ended without a word: killed, or on a machine that is gone"


@pytest.mark.parametrize(
    ("fault", "rank", "sentence"),
    [
        ("memory", 0, ALLOCATOR),
        ("memory", 1, ALLOCATOR),
        ("address-space", 0, ALLOCATOR),
        ("address-space", 1, ALLOCATOR),
        ("memory-in-the-optimizer", 1, r"rank {rank} failed in update 6: out of memory \(MemoryError\); use a smaller"),
        ("bug", 0, BUG),
        ("bug", 1, BUG),
    ],
    ids=["memory-0", "memory-1", "address-space-0", "address-space-1", "optimizer-1", "bug-0", "bug-1"],
)
def test_what_fails_on_one_rank_ends_the_others(data, undisturbed, tmp_path, fault, rank, sentence):
    with started(data, tmp_path / "run", fault=f"{fault} {rank} 6") as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (3, 3), show(ending)
    require_said_once(ending, sentence.format(rank=rank), job.folder, traceback=fault == "bug")
    assert left == []
    if fault == "memory-in-the-optimizer":  # in the middle of an update
        require_resumable(job.folder, data, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_killed_is_named(data, tmp_path, rank):
    with started(data, tmp_path / "run", fault=f"kill {rank} 6") as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == ((-9, 3) if rank == 0 else (3, -9)), show(ending)
    require_said_once(ending, KILLED.format(rank=rank), job.folder)
    assert left == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_before_training_that_one_rank_hears_stops_both(data, tmp_path, rank):
    with started(data, tmp_path / "run", fault=f"request {rank} 0") as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (138, 138), show(ending)
    assert ending.printed.count("asked to stop before training began: the same command begins or goes on\n") == 1
    assert "error" not in ending.printed
    assert left == []


@pytest.mark.parametrize("script", ["bert_trainer.py", "bert_accelerate.py"])
def test_the_other_commands_do_the_same(data, tmp_path, script):
    with started(data, tmp_path / "run", "data.workers=1", fault="memory 1 6", script=script) as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (3, 3), show(ending)
    require_said_once(ending, ALLOCATOR.format(rank=1), job.folder)
    assert left == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_through_a_launcher_the_sentence_is_the_same(data, tmp_path, launcher):
    script = "bert_accelerate.py" if launcher == "accelerate" else "bert.py"
    with started(data, tmp_path / "run", fault="memory 1 6", launcher=launcher, script=script) as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.status != 0
    assert ending.printed.count("error: rank 1 failed in update 6: out of memory") == 1, show(ending)
    assert left == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_memory_is_too_small_for_leaves_the_previous_one_whole(data, tmp_path, rank):
    with started(data, tmp_path / "run", fault=f"memory-at-a-checkpoint {rank} 8") as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (3, 3), show(ending)
    sentence = rf"the checkpoint of step 8 could not be written \(rank {rank}: MemoryError"
    require_said_once(ending, sentence, job.folder)
    assert checkpoints(job.folder) == ["step-00000004"]
    assert left == []


def test_what_all_ranks_should_have_said_is_not_lost_if_one_says_it(data, tmp_path):
    with started(data, tmp_path / "run", fault="refusal 1 6") as job:
        ending = job.end()
    assert ending.statuses == (3, 3), show(ending)
    require_said_once(ending, "this rank alone refuses; ", job.folder)
