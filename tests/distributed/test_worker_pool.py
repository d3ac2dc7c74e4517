"""A worker that dies says why."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from .pool import CaseFailed, WorkerPool


def _abort() -> None:
    print("what the library wrote last", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)


def _seven() -> int:
    return 7


def test_a_worker_that_dies_says_how_and_what_it_had_written() -> None:
    pool = WorkerPool(1)
    try:
        message = r"rank 0: died \(SIGABRT\); it had written:\n(.|\n)*what the library"
        with pytest.raises(CaseFailed, match=message) as failed:
            pool.run(_abort)
        assert "_abort" in str(failed.value)  # where it was, from faulthandler
        assert pool.run(_seven) == [7]
    finally:
        pool.close()
