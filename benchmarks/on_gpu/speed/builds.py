"""DeepSpeed's compiled optimizers, built beside the measurements: python -m benchmarks.on_gpu.speed.builds BUILDER.

A build that was stopped leaves a lock file, at which the next one waits for good. So each has a folder of its own per
run and a limit, and only what is finished is loaded in the process that measures.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..children.limited import Child, python

__all__ = ["BUILDERS", "Builds"]

BUILDERS = {"DeepSpeed FusedAdam": "FusedAdamBuilder", "DeepSpeed FusedLamb": "FusedLambBuilder"}
"""Of the contenders that need one."""


class Builds:
    """All of them at once, begun when it is made.

    Attributes:
        running: By the contender's name.
        outcomes: "" of those that are built, or why one is not.
    """

    def __init__(self, folder: Path, limit: float, log: Path, contenders: Sequence[str] = tuple(BUILDERS)) -> None:
        """Build into `folder`, each in at most `limit` seconds; what compilers say goes to `log` with a suffix."""
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)  # where this process will find them
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # a compiler of another minor version will do
        self.outcomes: dict[str, str] = {}
        self.running = {
            name: Child.start(
                python("benchmarks.on_gpu.speed.builds", BUILDERS[name]),
                limit,
                log.with_name(f"{log.name}-{BUILDERS[name]}.log"),
            )
            for name in contenders
        }

    def finish(self, seconds: float) -> dict[str, str]:
        """Wait for all, for at most `seconds` from now on; see `outcomes`."""
        for child in self.running.values():
            child.limit = min(child.limit, child.seconds + max(0.0, seconds))
        self.outcomes.update({name: child.wait() for name, child in self.running.items()})
        self.running = {}
        return self.outcomes

    def end(self) -> None:
        """Stop what still builds."""
        for child in self.running.values():
            child.end()
        self.running = {}


def build(builder: str) -> None:
    """Compile and load one."""
    getattr(importlib.import_module("deepspeed.ops.op_builder"), builder)().load()


if __name__ == "__main__":
    build(sys.argv[1])
