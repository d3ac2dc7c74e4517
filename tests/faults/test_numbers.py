"""Numbers that go wrong: a loss that is none on one rank, gradients beyond fp16, a clock that jumps."""

from __future__ import annotations

import pytest

from .endings import require_said_once
from .faulty_runs import STEPS, checkpoints, losses, show, started, train_records

LEAST = r"1\d updates in a row .* at a loss scale of 1 \(DeepSpeed lowers it no further\)"


@pytest.mark.parametrize(
    ("script", "most", "sentence"),
    [
        ("bert.py", 20, LEAST),
        ("bert_trainer.py", 20, LEAST),
        ("bert.py", 10, r"10 updates in a row .* at a loss scale of \d+ \(run.most_skipped_updates=10\)"),
    ],
    ids=["least scale", "trainer", "most skipped"],
)
def test_gradients_that_overflow_for_good_end_the_run(data, tmp_path, script, most, sentence):
    """On one rank: DeepSpeed asks all of them, and gives up at its least loss scale."""
    options = (
        "--precision",
        "fp16",
        "--zero_stage",
        "1",
        "--steps",
        "60",
        f"run.most_skipped_updates={most}",
        "run.noise_scale=false",
    )
    with started(data, tmp_path / "run", *options, fault="overflow 1 6", script=script) as job:
        ending = job.end()
    assert ending.statuses == (3, 3), show(ending)
    require_said_once(ending, sentence, job.folder)
    assert checkpoints(job.folder)


def test_a_few_overflows_are_usual(data, tmp_path):
    """The loss scale begins at 65,536 and comes down; training goes on."""
    options = ("--precision", "fp16", "run.most_skipped_updates=8")
    with started(data, tmp_path / "run", *options, fault="overflow 1 1000") as job:
        ending = job.end()
    assert ending.statuses == (0, 0), show(ending)


def test_a_clock_that_jumps_is_not_seen(data, undisturbed, tmp_path):
    """Neither by the numbers of the records, nor by whoever waits."""
    with started(data, tmp_path / "run", "run.hang_seconds=60", fault="clock 0 4") as job:
        ending = job.end()
    assert ending.statuses == (0, 0), show(ending)
    assert losses(job.folder) == losses(undisturbed)
    records = train_records(job.folder)
    assert len(records) == STEPS
    assert all(0 < record["seconds"] < 60 for record in records)
    assert all(0 <= record["data_wait_seconds"] < 60 for record in records)
