"""The end of a rank's process: with the status of its run, whatever threads are left."""

from __future__ import annotations

import atexit
import os
import sys

__all__ = ["Ending"]

UNWRITTEN = 120
"""What Python itself ends with where the last of what was printed could not be written."""


class Ending:
    """Ends the process in place of the interpreter, after everything else that was to be done at its exit.

    Wrappers keep process groups in circles, and a thread of gloo's that outlives the interpreter now and then aborts a
    process ("terminate called without an active exception"), whose run is complete, with SIGABRT.

    Attributes:
        status: What the run ended with; None, and the interpreter ends as usual, until that is known.
    """

    def __init__(self) -> None:
        """Come last of all that will be registered for the exit from now on."""
        self.status: int | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.status is None:
            return
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # ValueError: it was closed
                self.status = self.status or UNWRITTEN
        os._exit(self.status)
