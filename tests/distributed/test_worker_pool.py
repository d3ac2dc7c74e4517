"""A worker that dies says why, and no case finds what libraries keep of the one before it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from ..fresh_libraries import fresh_libraries
from .pool import CaseFailed, WorkerDied, WorkerPool


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


def _use_libraries(*precisions: str) -> dict[str, bool]:
    """Find what a case left, and leave the same."""
    found = {
        "configuration": is_deepspeed_zero3_enabled(),
        "environment": "ACCELERATE_USE_DEEPSPEED" in os.environ,
        "linear": torch.nn.functional.linear is zero3_linear_wrap,
    }
    for precision in precisions:
        Accelerator(cpu=True, mixed_precision=precision)
    torch.nn.functional.linear = zero3_linear_wrap
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    _kept.append(HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}))
    return found


_kept: list[HfDeepSpeedConfig] = []
_NOTHING = {"configuration": False, "environment": False, "linear": False}


def test_a_case_begins_as_in_a_new_process() -> None:
    pool = WorkerPool(1)
    try:
        with pytest.raises(CaseFailed, match="already been initialized"):
            pool.run(_use_libraries, "no", "bf16")
        for precision in ("bf16", "no", "bf16"):
            assert pool.run(_use_libraries, precision) == [_NOTHING]
    finally:
        pool.close()


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_test_begins_as_in_a_new_process(precision: str) -> None:
    assert _use_libraries(precision) == _NOTHING


def test_what_a_test_leaves_would_be_found() -> None:
    with fresh_libraries():
        _use_libraries("no")
        with pytest.raises(ValueError, match="already been initialized"):
            _use_libraries("bf16")
        assert all(_use_libraries("no").values())
    assert _use_libraries("bf16") == _NOTHING
