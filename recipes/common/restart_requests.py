"""SIGUSR1: a cluster asks the run to stop for now, and starts the same command again later.

SIGTERM and Ctrl-C mean that somebody has had enough, and a run that they stop ends with status 0. Of this one a batch
file has to know that it goes on: it ends with `STOPPED`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from .errors import STOPPED

STATUS_FILE = "TRUSTRATIO_STATUS_FILE"
"""Variable: a file to which a process appends its exit status, if it is not 0.

Launchers make another number of a rank's status, and call it a failure. Whoever sets the variable (`launch/node.sh`)
reads the file instead, so a rank that was stopped ends with 0 towards its launcher.
"""


BEFORE_TRAINING = "asked to stop before training began: the same command begins or goes on"


class RestartRequests:
    """Takes SIGUSR1 in a thread of its own, since the main one may wait for other ranks, deaf to signals, for hours.

    Attributes:
        heard: whether it came.
    """

    def __init__(self) -> None:
        """Hear nothing yet."""
        self.heard = False
        self._answer: Callable[[], None] | None = None
        self._tell: Callable[[], None] | None = None

    def listen(self) -> None:
        """Hear from now on; called before other threads begin, which must not take the signal.

        Processes that this one starts inherit that it is blocked: it ends none of them.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # `launch/node.sh` has launchers ignore it
        threading.Thread(target=self._wait, name="restart requests", daemon=True).start()

    def answer_by(self, answer: Callable[[], None]) -> None:
        """Let `answer` be called, in the thread; until then the process ends at once."""
        self._answer = answer

    def tell_by(self, tell: Callable[[], None] | None) -> None:
        """Let `tell` be called, in the thread, before the process ends at once: other ranks may have heard nothing."""
        self._tell = tell

    def over(self) -> None:
        """Note what comes from now on, and do nothing about it: the process ends anyway, with a status of its own."""
        self._answer = lambda: None

    def _wait(self) -> None:
        while True:
            signal.sigwait((signal.SIGUSR1,))
            self.heard = True
            if self._answer is not None:
                self._answer()
                continue
            if os.environ.get("RANK", "0") == "0":
                os.write(2, f"{BEFORE_TRAINING}\n".encode())
            if self._tell is not None:
                self._tell()
            os._exit(told(STOPPED))


RESTARTS = RestartRequests()
"""Those of this process."""


def told(status: int) -> int:
    """Leave an exit status where STATUS_FILE asks for it; return the one to end with."""
    file = os.environ.get(STATUS_FILE)
    if not file or status == 0:
        return status
    with open(file, "a", encoding="ascii") as statuses:
        statuses.write(f"{status}\n")
    return 0 if status == STOPPED else status
