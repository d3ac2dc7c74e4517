"""Worker processes that end with the process that started them, even if that is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this worker process as soon as its parent is gone; called in the worker, which goes on meanwhile.

    The workers of a `ProcessPoolExecutor` would wait for work for ever: each of them holds the pipe open for all.
    """
    threading.Thread(target=_end_after_parent, name="parent watch", daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
