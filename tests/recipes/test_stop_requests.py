"""Requests to stop: who was asked, what is said, and what is put back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from trustratio.recipes.common.errors import STOPPED
from trustratio.recipes.common.progress import PROGRESS
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.common.restart_requests import RestartRequests
from trustratio.recipes.training import session, stop_requests
from trustratio.recipes.training.stop_requests import StopRequests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("speaks", [True, False])
def test_one_rank_says_once_what_is_finished_first(capfd, monkeypatch, number, speaks):
    monkeypatch.setattr(PROGRESS, "doing", "while validating after update 3")
    before = signal.getsignal(number)
    with StopRequests(speaks) as stop:
        assert not stop.requested
        for _ in range(2):  # from the terminal and from the launcher
            os.kill(os.getpid(), number)
        assert stop.requested
    said = "asked to stop while validating after update 3: this is finished, then a checkpoint is written\n"
    assert capfd.readouterr().err == said * speaks
    assert signal.getsignal(number) is before


def test_after_the_last_checkpoint_none_is_promised(capfd, monkeypatch):
    monkeypatch.setattr(PROGRESS, "doing", "while writing the checkpoint of step 6")
    monkeypatch.setattr(PROGRESS, "alone", True)
    with StopRequests(speaks=True):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "asked to stop while writing the report: this is finished, and the run has ended\n"


@pytest.mark.parametrize("speaks", [True, False])
def test_a_request_to_be_started_again_is_one_to_stop(capfd, monkeypatch, speaks):
    """As the thread that waits for SIGUSR1 hands it on; before and after, nothing is noted here."""
    restarts = RestartRequests()
    monkeypatch.setattr(stop_requests, "RESTARTS", restarts)
    with StopRequests(speaks) as stop:
        assert restarts._answer is not None
        restarts.heard = True
        for _ in range(2):  # a node asks every second
            restarts._answer()
        assert stop.requested
        assert stop.to_be_continued
    restarts._answer()
    assert capfd.readouterr().err.count("asked to stop") == speaks


@pytest.mark.parametrize(
    ("is_over", "asked", "status"),
    [(False, (False, True), STOPPED), (False, (False, False), 0), (True, (True, True), 0)],
)
def test_all_ranks_end_alike_whichever_was_asked(monkeypatch, is_over, asked, status):
    monkeypatch.setattr(session, "collect", lambda own: [(1.0, one) for one in asked])
    run, batches = SimpleNamespace(first=0), SimpleNamespace(step=4, expected_last=9, is_over=is_over)
    for own in asked:
        stop = SimpleNamespace(to_be_continued=own)
        ended = session.announce_end(run, batches, Path("run"), stop, Reporter(active=False))  # type: ignore[arg-type]
        assert ended == status
