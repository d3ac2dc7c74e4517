"""What a part is given, and where it leaves its numbers: python -m benchmarks.on_gpu.part NAME runs one, alone."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "Failed", "Part"]

PARTS = ("machine", "kernels", "speed", "sharded", "job", "throughput", "batch64k")
"""In the order of their worth. Each is a module in `parts/` with a function `run(part) -> str`, the verdict."""


class Failed(Exception):
    """Raised by a part that has run to its end and found something wrong; its text is the verdict."""


@dataclass
class Part:
    """One part of the run.

    Attributes:
        name: Of `PARTS`.
        output: Folder of the whole run; this part writes NAME.json there, and what else it leaves as NAME-*.
        limit: Seconds after which the process is killed.
        rehearse: Whether this is the CPU at toy size.
        found: What NAME.json has so far.
    """

    name: str
    output: Path
    limit: float
    rehearse: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """Type of the device, for torch."""
        return "cpu" if self.rehearse else "cuda"

    def left(self) -> float:
        """Seconds until the process is killed."""
        return self.limit - (time.monotonic() - self.began)

    def record(self, **values: Any) -> None:
        """Add to NAME.json, on disk at once: whatever stops the part later, this is kept."""
        self.found.update(values)
        path = self.output / f"{self.name}.json"
        unfinished = path.with_suffix(".json.new")
        unfinished.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(unfinished, path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu.part")
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    part = Part(options.name, options.output, options.limit, options.rehearse)
    part.found.update(_facts_of_the_run(options.output / f"{part.name}.json"))
    try:
        verdict = importlib.import_module(f"benchmarks.on_gpu.parts.{part.name}").run(part)
    except Failed as failure:
        part.record(verdict=str(failure), seconds=round(time.monotonic() - part.began, 1))
        return 1
    except Exception as error:
        traceback.print_exc()
        part.record(verdict=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        return 1
    part.record(verdict=verdict, seconds=round(time.monotonic() - part.began, 1))
    return 0


def _facts_of_the_run(path: Path) -> dict[str, Any]:
    """What the command has written there of a part that it starts, and of no earlier one."""
    try:
        run = json.loads(path.read_text())["run"]
        return {"run": run} if run["outcome"] == "running" else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def leave(status: int) -> None:
    """End the process, whose numbers are on disk: threads of communicators and compilers may keep an interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    from benchmarks.on_gpu import part as module  # whose `Failed` the parts raise; this one's is another class

    module.leave(module.main(sys.argv[1:]))
