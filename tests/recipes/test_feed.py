"""The feed: the same batches at any number of workers and after a resume, one step of foresight, waits measured."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.recipes.conftest import sentences
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data.feed import BatchFeed, default_workers
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.rules.global_batch import BatchPlan

PLAN = BatchPlan(4, 2, 2)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(i, 200) for i in range(4)))
    config = DataConfig(sources=(str(tmp_path / "a.txt"),), vocabulary=200, sequence_length=16)
    return prepare(config, Reporter(active=False))


@pytest.fixture
def masked(data):
    return MaskedRows(data.rows("train"), data.vocabulary(), 0.15, 1)


def same(one, other):
    return all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(vars(x).values(), vars(y).values(), strict=True)
    )


def test_workers_and_resume_do_not_change_the_batches(masked):
    expected = [masked.step_batches(step, PLAN, 1) for step in range(60)]  # more than one epoch
    state = torch.get_rng_state()
    for workers, first in ((0, 0), (2, 23)):
        feed = BatchFeed(masked, PLAN, 1, first, 60, workers)
        for step in range(first, 60):
            assert same(feed.take(), expected[step]), (workers, step)
        with pytest.raises(StopIteration):
            feed.take()
        feed.close()
    assert torch.equal(torch.get_rng_state(), state)  # dropout's stream is untouched
    assert len(masked.rows) < 60 * PLAN.sequences


def test_a_step_that_fails_is_known_one_step_ahead(masked, monkeypatch):
    real = MaskedRows.step_batches

    def breaking(self, step, plan, rank):
        if step == 3:
            raise RecipeError("the token file train-00007.bin is cut short")
        return real(self, step, plan, rank)

    monkeypatch.setattr(MaskedRows, "step_batches", breaking)
    feed = BatchFeed(masked, PLAN, 0, 0, 10)
    for _ in range(2):
        feed.take()
        assert feed.failure is None
    feed.take()
    assert "train-00007.bin" in str(feed.failure)
    with pytest.raises(RecipeError, match=r"train-00007\.bin"):
        feed.take()
    assert "train-00007.bin" in str(BatchFeed(masked, PLAN, 0, 3, 10).failure)


@pytest.mark.parametrize("workers", [0, 2])
def test_updates_of_several_rounds_are_the_steps_of_the_stream(masked, workers):
    """Batches that grow: 8, 8, 16, 32 and the rest of 68 sequences, in rounds of 4 on each of two ranks."""
    rounds = BatchPlan(4, 1, 2)
    feed = BatchFeed(masked, rounds, 1, 0, 9, workers)
    begin = 0
    for accumulation in (1, 1, 2, 4, 1):
        expected = [masked.step_batches(begin + i, rounds, 1)[0] for i in range(accumulation)]
        assert same(feed.take(accumulation, ahead=2 * accumulation), expected)
        begin += accumulation
    with pytest.raises(StopIteration):
        feed.take()
    feed.close()


def test_rounds_that_fail_are_known_as_far_as_the_next_update_may_reach(masked, monkeypatch):
    real = MaskedRows.step_batches

    def breaking(self, step, plan, rank):
        if step == 5:
            raise RecipeError("the token file train-00007.bin is cut short")
        return real(self, step, plan, rank)

    monkeypatch.setattr(MaskedRows, "step_batches", breaking)
    feed = BatchFeed(masked, BatchPlan(4, 1, 2), 0, 0, 20)
    feed.take(1, ahead=2)
    feed.take(1, ahead=2)
    assert feed.failure is None  # rounds 2 and 3 are there
    feed.take(1, ahead=4)
    assert "train-00007.bin" in str(feed.failure)  # of rounds 3 to 6, which a batch of four would read
    with pytest.raises(RecipeError, match=r"train-00007\.bin"):
        feed.take(4)


def exhaust(feed):
    for _ in range(20):
        feed.take()


def test_a_broken_file_and_a_killed_worker_are_named(data, masked):
    feed = BatchFeed(masked, PLAN, 0, 0, 1000, workers=1)
    feed.take()
    (worker,) = feed._steps._workers
    os.kill(worker.pid, signal.SIGTERM)  # ignored, as Ctrl-C is
    time.sleep(0.2)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RecipeError, match=r"a data worker ended unexpectedly .*token files in"):
        exhaust(feed)
    feed.close()
    feed = BatchFeed(masked, PLAN, 0, 0, 1000)
    os.truncate(Path(data.folder) / "train-00000.bin", 10)
    with pytest.raises(RecipeError, match=r"train-00000\.bin has 10 bytes"):
        exhaust(feed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_still_start_ignore_what_reaches_the_whole_group(masked, number):
    """For the seconds of their imports nobody has told them to."""
    others = set(multiprocessing.active_children())

    def reach() -> None:
        while not (new := set(multiprocessing.active_children()) - others):
            time.sleep(0.01)
        for _ in range(20):
            for worker in new:
                os.kill(worker.pid, number)
            time.sleep(0.05)

    thread = threading.Thread(target=reach, daemon=True)
    thread.start()
    feed = BatchFeed(masked, PLAN, 0, 0, 1000, workers=1)
    thread.join(60)
    assert feed.failure is None
    feed.take()
    feed.close()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


def test_waiting_is_measured(masked, monkeypatch):
    real = MaskedRows.step_batches

    def slow(self, step, plan, rank):
        time.sleep(0.2)
        return real(self, step, plan, rank)

    monkeypatch.setattr(MaskedRows, "step_batches", slow)
    feed = BatchFeed(masked, PLAN, 0, 0, 10)
    feed.take()
    assert feed.wait_seconds >= 0.2


def test_a_rank_gets_workers_where_a_device_could_wait():
    assert default_workers(torch.device("cpu"), 1) == 0
    assert default_workers(torch.device("cuda"), 1) >= 1
    assert default_workers(torch.device("cuda"), 10_000) == 1
