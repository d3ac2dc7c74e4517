"""Requests to stop a run: Ctrl-C, or SIGTERM, which `common/launcher_watch.py` sends, too; SIGUSR1 by a cluster."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from ..common.progress import PROGRESS
from ..common.restart_requests import RESTARTS


class StopRequests:
    """Context manager that turns signals into a flag, which the training loop reads between steps.

    Ranks see a signal at different moments, or not at all, so the loop adds the flags up over the ranks before it acts.
    """

    def __init__(self, speaks: bool) -> None:
        """Watch nothing yet; enter the context to start.

        Args:
            speaks: this rank says that it has heard, since what is under way, a validation above all, may take long.
        """
        self._speaks, self._signalled = speaks, False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signalled

    @property
    def to_be_continued(self) -> bool:
        """Whether this rank was asked by SIGUSR1, and the cluster starts the run again."""
        return RESTARTS.heard

    def __enter__(self) -> StopRequests:
        """Install the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        RESTARTS.answer_by(self._note_restart)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the previous handlers back."""
        RESTARTS.over()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note_restart(self) -> None:
        self._note(signal.SIGUSR1, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A single Ctrl-C reaches a rank twice (from the terminal and from the launcher), so repeats mean nothing.
        if self._speaks and not self._signalled:
            text = f"asked to stop {PROGRESS.doing}: this is finished, then a checkpoint is written\n"
            if PROGRESS.alone:  # after the last checkpoint
                text = "asked to stop while writing the report: this is finished, and the run has ended\n"
            os.write(2, text.encode())  # unlike print, not in the middle of another print of this thread
        self._signalled = True
