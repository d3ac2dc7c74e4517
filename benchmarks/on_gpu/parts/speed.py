"""Steps on BERT's shapes: this package's optimizers beside torch's, DeepSpeed's, apex's and timm's."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.machine import copy_bandwidth, describe_machine
from benchmarks.shapes import SHAPES, Shape

from ..part import Failed, Part
from ..speed.builds import Builds
from ..speed.contenders import OURS, with_extensions, without_extensions
from ..speed.devices import device_of
from ..speed.measuring import Rounds, measure_batch, measure_graph
from ..speed.page import has_lamb, tables, verdict
from ..speed.subject import Subject

__all__ = ["run", "tables"]

RESERVE = 5.0
"""Seconds at the end in which nothing is begun."""
LEAST = {"lamb": 8.0, "others": 12.0, "graph": 3.0, "extensions": 8.0}
"""Seconds that a case must have left besides."""
BUILD_SECONDS = 150.0
TOYS: dict[str, list[Shape]] = {"bert-base": [(40, 16), (16,)], "bert-large": [(64, 16), (16,)]}
"""Of the names that stand in for them: Triton's interpreter takes milliseconds for each block of each layer."""


def run(part: Part) -> str:
    """Measure case by case, the most telling first, and return the line for the summary.

    Raises:
        Failed: With that line, if a case raised an error, or LAMB has no times.
    """
    os.environ["DS_ACCELERATOR"] = part.device
    if part.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported, which the first step does
    limit = 3.0 if part.rehearse else min(BUILD_SECONDS, part.left() - RESERVE)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        builds = Builds(Path(folder), limit, part.output / "speed-build")
        try:
            _Cases(part).measure(builds)
        finally:
            builds.end()
    if part.found["failed"] or not has_lamb(part.found):
        raise Failed(verdict(part.found))
    return verdict(part.found)


class _Cases:
    def __init__(self, part: Part) -> None:
        self.part = part
        self.device = device_of(part.device)
        self.rounds = Rounds(1, 0) if part.rehearse else Rounds(15, 2)
        self.shapes = TOYS if part.rehearse else {name: SHAPES[name] for name in ("bert-base", "bert-large")}
        self.sizes: dict[str, Any] = {}
        part.record(toy=part.rehearse, machine=describe_machine(part.device))
        part.record(sizes=self.sizes, did_not_fit=[], failed={})
        part.record(copy_bytes_per_second=copy_bandwidth(part.device, 1 << (16 if part.rehearse else 28)))

    def measure(self, builds: Builds) -> None:
        for what, contenders in zip(("lamb", "others"), without_extensions(), strict=True):
            for name in self.shapes:
                self._case(f"{what} at {name}", LEAST[what], partial(self._batch, name, contenders))
        for optimizer in OURS:
            for name in list(self.shapes)[: 1 if self.part.rehearse else None]:
                what = f"{optimizer} in a CUDA graph at {name}"
                self._case(what, LEAST["graph"], partial(self._graph, name, optimizer))
        self._case("DeepSpeed's extensions", LEAST["extensions"], partial(self._extensions, builds))

    def _case(self, what: str, seconds: float, case: Callable[[], None]) -> None:
        """Run a case, whose errors take nothing from the next, or note that it did not fit."""
        needed = RESERVE + (0.0 if self.part.rehearse else seconds)
        if self.part.left() < needed:
            line = f"{what}: needs {needed:.0f} s, {self.part.left():.0f} were left"
            self.part.record(did_not_fit=[*self.part.found["did_not_fit"], line])
            return
        try:
            case()
        except Exception as error:
            self.part.record(failed={**self.part.found["failed"], what: f"{type(error).__name__}: {error}"[:300]})
        gc.collect()

    def _batch(self, name: str, contenders: list[Contender]) -> None:
        subject = Subject(self.shapes[name], self.part.device)
        size = self._size(name)
        size.update(elements=subject.elements, layers=len(subject.parameters), groups=len(subject.groups()))
        number = len(size["batches"])
        size["batches"].append({})

        def tell(rows: dict[str, Any]) -> None:
            size["batches"][number] = rows
            self._keep()

        measure_batch(subject, contenders, self.part.device, self.device, self.rounds, tell)

    def _graph(self, name: str, optimizer: str) -> None:
        subject = Subject(self.shapes[name], self.part.device)
        found = measure_graph(optimizer, subject, self.part.device, self.device, self.rounds)
        self._size(name)["graphs"][optimizer] = found
        self._keep()

    def _extensions(self, builds: Builds) -> None:
        self.part.record(builds=builds.finish(self.part.left() - RESERVE - LEAST["extensions"]))
        not_built = {
            name: {"kind": "", "missing": f"not built: {outcome}"}
            for name, outcome in self.part.found["builds"].items()
            if outcome
        }
        for size in self.sizes.values() if not_built else ():
            size["batches"].append(not_built)
        self._keep()
        contenders = with_extensions(self.part.found["builds"])
        for name in reversed(self.shapes) if contenders else ():
            self._case(f"DeepSpeed's extensions at {name}", 0.0, partial(self._batch, name, contenders))

    def _keep(self) -> None:
        """Write what there is, with its line for the summary: the part may be stopped at any time."""
        self.part.record(sizes=self.sizes)
        self.part.record(verdict=verdict(self.part.found))

    def _size(self, name: str) -> dict[str, Any]:
        size: dict[str, Any] = self.sizes.setdefault(name, {"batches": [], "graphs": {}})
        return size
