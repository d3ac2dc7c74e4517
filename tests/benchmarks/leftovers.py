"""Whether a process that was killed is gone."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["is_gone"]


def is_gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process ends within this time: on a busy machine one that was killed is still there for a moment."""
    deadline = time.monotonic() + seconds
    while _runs(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
