"""A rank that stands still ends the run, which names it; how long that may take is `run.hang_seconds`.

Faults make the ranks impatient when they befall one, so that the slow start of a busy machine is none.
"""

from __future__ import annotations

import pytest

from .endings import require_resumable, require_said_once
from .faulty_runs import LAUNCHERS, show, started


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_ends_the_others(data, undisturbed, tmp_path, stopped):
    """Nobody but the ranks themselves ends them here: the stopped one is left for the test to kill."""
    with started(data, tmp_path / "run", fault=f"stop {stopped} 6") as job:
        ending = job.end(but=(stopped,))
        left = job.left_behind()
    assert ending.statuses[1 - stopped] == 3, show(ending)
    silent = "rank 1 gave the last sign of life " if stopped else "rank 0, or the store of its launcher, is silent"
    require_said_once(ending, f"the run stands still: {silent}", job.folder)
    assert left == []
    require_resumable(job.folder, data, undisturbed)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_end_what_is_stopped(data, tmp_path, launcher):
    """A stopped process gets no SIGTERM: launchers kill it half a minute later."""
    script = "bert_accelerate.py" if launcher == "accelerate" else "bert.py"
    with started(data, tmp_path / "run", fault="stop 1 6", launcher=launcher, script=script) as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.status != 0
    assert ending.printed.count("error: the run stands still: rank 1 gave the last sign of life ") == 1, show(ending)
    assert left == []


@pytest.mark.parametrize(
    ("fault", "script", "place"),
    [
        ("sleep 0 6", "bert.py", r"in update 6, in loop.py, line \d+ \(_update\)"),
        ("sleep 1 6", "bert_trainer.py", r"in update 6, in trainer.py, line \d+ \(on_step_begin\)"),
        ("sleep-in-a-worker 1 8", "bert.py", r"in update 7, in feed.py, line \d+ \(_fetch\)"),
    ],
    ids=["first", "trainer", "worker"],
)
def test_a_rank_that_sleeps_is_named_with_its_place(data, tmp_path, fault, script, place):
    """And its data workers end with it."""
    workers = "data.workers=1" if "worker" in fault else "data.workers=0"
    with started(data, tmp_path / "run", workers, fault=fault, script=script) as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (3, 3), show(ending)
    asleep = fault.split()[1]
    sentence = rf"the run stands still: rank {asleep} has done nothing for \d+ seconds {place}; the others wait"
    require_said_once(ending, sentence, job.folder)
    assert left == []


def test_a_single_process_watches_itself(data, tmp_path):
    with started(data, tmp_path / "run", fault="sleep 0 6", ranks=1) as job:
        ending = job.end()
    assert ending.statuses == (3,), show(ending)
    sentence = r"the run stands still: rank 0 has done nothing for \d+ seconds in update 6, in loop.py, line \d+ "
    require_said_once(ending, sentence, job.folder)


def test_a_rank_that_never_comes_is_told(data, tmp_path):
    with started(data, tmp_path / "run", "run.hang_seconds=5", fault="absence 1 0") as job:
        ending = job.end(but=(1,))
    assert ending.statuses[0] == 3, show(ending)
    assert "error: the run stands still: the ranks have not met; rank 0 has done nothing for" in ending.printed


def test_long_work_of_one_rank_is_no_standstill(data, tmp_path):
    """The first rank prepares for longer than the others may stand still, a document at a time."""
    with started(data, tmp_path / "run", "--steps", "2", fault="long-preparation 0 16") as job:
        ending = job.end()
    assert ending.statuses == (0, 0), show(ending)
