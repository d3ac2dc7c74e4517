"""Requests to stop: who was asked, what is said, and what is put back."""

from __future__ import annotations

import os
import signal

import pytest

from trustratio.recipes.common.progress import PROGRESS
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
