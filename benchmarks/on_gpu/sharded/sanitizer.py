"""compute-sanitizer's memcheck on small steps: accesses outside of what was allocated."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..children.limited import NOT_FINISHED, Child, python

__all__ = ["Memcheck"]

SECONDS = 90.0
BEGUN, STEPPED = "the device answers", "stepped"
"""What the program says before its first step, and after its last one."""
WRONG = 86
"""The tool's exit status where an access is wrong."""
SEARCHED = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin"
OPTIONS = (
    *("--tool", "memcheck", "--target-processes", "application-only"),
    *("--report-api-errors", "no", "--error-exitcode", str(WRONG)),
)
"""Calls that fail are no accesses: torch tries some at its start, to see what there is. Compilers are not watched."""
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
REPORTED = re.compile(r"^=+ (Invalid .*|.*out of bounds.*|Program hit .*)$", re.MULTILINE)


class Memcheck:
    """The steps of `one_step` under the tool; in a rehearsal without it, to see them run.

    Attributes:
        found: `errors`, how many accesses are wrong, and `first`, what is said of the first of them; or `failed`,
            how the steps themselves ended; or `missing`, why nothing is known.
    """

    def __init__(self, device: str, log: Path, search: str = SEARCHED) -> None:
        """Start the program on the device, with all output in `log`."""
        self.log, self.rehearses = log, device == "cpu"
        self.found: dict[str, Any] = {}
        tool = shutil.which("compute-sanitizer", path=search)
        command = python("benchmarks.on_gpu.sharded.one_step", device)
        if tool and not self.rehearses:
            # Memory that torch keeps would be allocated, however far beyond its tensor an access is.
            command = [tool, *OPTIONS, *command]
        self.child: Child | None = None
        if tool or self.rehearses:
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "1" if self.rehearses else "0"}
            self.child = Child.start(command, SECONDS, log, environment)
        else:
            self.found = {"missing": "compute-sanitizer is not installed"}

    def poll(self) -> bool:
        """Look whether it has ended; returns whether `found` is new."""
        if self.child is None or self.done or (outcome := self.child.outcome()) is None:
            return False
        self.found = self._read(outcome)
        return True

    @property
    def done(self) -> bool:
        """Whether `found` is there."""
        return bool(self.found)

    @property
    def todo(self) -> list[str]:
        """What has not come out yet."""
        return [] if self.done else ["memcheck"]

    def end(self) -> None:
        """Stop it."""
        if self.child is not None:
            self.child.end()

    def _read(self, outcome: str) -> dict[str, Any]:
        text = self.log.read_text(errors="replace")
        summaries, reported = SUMMARY.findall(text), REPORTED.findall(text)
        # A wrong access ends the steps: then they were not all taken, and the summary may be missing too.
        if errors := sum(map(int, summaries)) or len(reported):
            return {"errors": errors, **({"first": reported[0][:200]} if reported else {})}
        if summaries and STEPPED in text:
            return {"errors": 0}
        if self.rehearses and not outcome:
            return {"missing": "a rehearsal has no device; the steps ran without the tool"}
        # What ends before the steps begin is the tool's own trouble, such as a driver that it does not know.
        crashed = BEGUN in text and STEPPED not in text and not outcome.startswith(NOT_FINISHED)
        crashed |= outcome.startswith(f"status {WRONG}")
        return {"failed" if crashed else "missing": outcome or "the tool wrote no summary"}
