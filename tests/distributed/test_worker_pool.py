"""A worker that dies says why."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from .pool import WorkerDied, WorkerPool


def _abort(deaths: int, folder: Path) -> int:
    """Die as often as that; what is in the folder outlives a process."""
    died = len([*folder.iterdir()])
    if died == deaths:
        return 7
    (folder / str(died)).touch()
    print("what the library wrote last", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
    return 0


def test_a_worker_that_dies_says_how_and_the_case_is_tried_once_more(tmp_path: Path) -> None:
    message = r"rank 0: died \(SIGABRT\); it had written:\n(.|\n)*what the library(.|\n)*in _abort"
    pool = WorkerPool(1)
    try:
        with pytest.warns(UserWarning, match=message):
            assert pool.run(_abort, 1, tmp_path) == [7]
        with pytest.warns(UserWarning, match=message), pytest.raises(WorkerDied, match=message):
            pool.run(_abort, 3, tmp_path)
        assert pool.run(_abort, 3, tmp_path) == [7]
    finally:
        pool.close()
