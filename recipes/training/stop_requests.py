"""Requests to stop a run: Ctrl-C, or SIGTERM, which `common/launcher_watch.py` sends, too."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequests:
    """Context manager that turns signals into a flag, which the training loop reads between steps.

    Ranks see a signal at different moments, or not at all, so the loop adds the flags up over the ranks before it acts.
    """

    def __init__(self) -> None:
        """Watch nothing yet; enter the context to start."""
        self._signalled = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signalled

    def __enter__(self) -> StopRequests:
        """Install the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A single Ctrl-C reaches a rank twice (from the terminal and from the launcher), so repeats mean nothing.
        self._signalled = True
