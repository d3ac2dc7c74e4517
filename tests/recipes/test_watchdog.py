"""Whom the watchdog names; that it ends runs is shown in tests/faults."""

from __future__ import annotations

import threading

import pytest

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.progress import PROGRESS
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.configuration.ranges import check_ranges
from trustratio.recipes.training import watchdog
from trustratio.recipes.training.watchdog import Beat, RankFailure, Watchdog

WAITING = Beat(9, 60.0, "in update 7", 7, "in engines.py, line 1 (sum_over_ranks)", waits=True)
BUSY = Beat(9, 60.0, "in update 7", 7, "in feed.py, line 2 (_fetch)", waits=False)
BEHIND = Beat(9, 60.0, "in update 6", 6, "in loop.py, line 3 (_update)", waits=True)


@pytest.fixture
def first(monkeypatch):
    """The watchdog of the first of four ranks, which waits for the others."""
    dog = Watchdog(0, 4, 30)
    monkeypatch.setattr(dog, "_own", lambda: WAITING)
    return dog


@pytest.mark.parametrize(
    ("beats", "silent", "named"),
    [
        (
            [WAITING, BUSY, WAITING],
            [],
            "rank 2 has done nothing for 60 seconds in update 7, in feed.py, line 2 (_fetch)",
        ),
        ([BEHIND, BUSY, WAITING], [], "rank 1 has done nothing for 60 seconds in update 6, in loop.py, line 3 "),
        ([BUSY, BUSY, WAITING], [], "ranks 1, 2 have done nothing"),
        ([WAITING, WAITING, WAITING], [], "ranks 0, 1, 2, 3 have done nothing for 60 seconds in update 7"),
        ([WAITING, BUSY, WAITING], [3], "rank 3 gave the last sign of life in update 7: stopped, or cut off"),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(first, beats, silent, named):
    assert first._who(dict(enumerate(beats, start=1)), silent).startswith(named)


def test_of_many_ranks_a_few_are_named(first):
    beats = dict.fromkeys(range(1, 1000), BUSY)
    assert first._who(beats, list(beats)).startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 991 more gave")


def test_a_thousand_ranks_send_a_few_hundred_beats_a_second():
    assert 1000 / Watchdog(0, 1000, 30).period <= 250
    assert Watchdog(0, 2, 30).period == 1


def test_where_a_thread_waits_is_told():
    began, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (began.set(), over.wait()))
    thread.start()
    began.wait()
    place, waits = watchdog._place(thread.ident)
    over.set()
    thread.join()
    assert (place.split(",")[0], waits) == ("in threading.py", False)


@pytest.mark.parametrize("error", [ValueError("a bug"), MemoryError(), OSError(28, "No space left on device")])
def test_what_others_cannot_know_becomes_a_failure_of_this_rank(error, capsys):
    def work():
        with Watchdog(0, 1, None):
            PROGRESS.begin("while working")
            raise error

    with pytest.raises(RankFailure, match="rank 0 failed while working") as failure:
        work()
    assert failure.value.unsaid
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ValueError)


def test_what_all_ranks_know_passes_through():
    with pytest.raises(RecipeError, match="of all"), Watchdog(0, 1, None):
        raise RecipeError("of all")


@pytest.mark.parametrize(
    ("value", "allowed"),
    [("0", True), ("null", True), ("30", True), ("1", True), ("0.5", False), ("-1", False), ("Infinity", False)],
)
def test_how_long_a_run_may_stand_still_has_a_range(value, allowed):
    config = apply_overrides(get_preset("lamb-tiny"), [f"run.hang_seconds={value}"])
    if allowed:
        check_ranges(config)
    else:
        with pytest.raises(RecipeError, match=r"run.hang_seconds=.* is out of range: allowed is 0 or null"):
            check_ranges(config)
