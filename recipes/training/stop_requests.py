"""Requests to stop a run: Ctrl-C, SIGTERM, or the death of the `deepspeed` command that started it."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import psutil


class StopRequests:
    """Context manager that turns signals into a flag, which the training loop reads between steps.

    Ranks see a signal at different moments, or not at all, so the loop adds the flags up over the ranks before it acts.
    """

    def __init__(self) -> None:
        """Watch nothing yet; enter the context to start."""
        self._signalled = False
        self._previous: dict[int, Any] = {}
        self._launcher = _deepspeed_launcher()
        self._command_id = self._launcher.ppid() if self._launcher else 0

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signalled or self._command_is_gone()

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

    def _command_is_gone(self) -> bool:
        try:
            return self._launcher is not None and self._launcher.ppid() != self._command_id
        except psutil.Error:
            return True


def _deepspeed_launcher() -> psutil.Process | None:
    """Return this rank's parent if it is DeepSpeed's launcher, started by the `deepspeed` command; else None.

    The command handles no signals: killed, it leaves the launcher and the ranks running, and the launcher gets a new
    parent. Only a command of that name is watched, since a run in the background may outlive an ordinary shell.
    """
    try:
        launcher = psutil.Process(os.getppid())
        command = launcher.parent()
        if command is None or "deepspeed.launcher.launch" not in " ".join(launcher.cmdline()):
            return None
        return launcher if any(os.path.basename(word) == "deepspeed" for word in command.cmdline()[:3]) else None
    except psutil.Error:
        return None
