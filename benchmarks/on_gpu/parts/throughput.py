"""Sequences per second and model FLOP/s of BERT-base and BERT-large at 128 and 512 tokens, compiled and not."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from trustratio.recipes.model.flops import peak_of
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.quiet import quieten
from trustratio.recipes.training.ranks import start

from ..part import Failed, Part
from ..throughput.cases import CASES, REAL, TOY, Case
from ..throughput.engine import ACCUMULATION, Bench, build, compiled_or_not, memory_for
from ..throughput.measure import kernels, measure_updates
from ..throughput.page import is_good, tables, verdict

__all__ = ["run", "tables"]

GOAL = 0.5
"""Share of the peak; below it the kernels are listed that take the time."""

FIRST_SECONDS = {True: 25.0, False: 10.0}
"""What the first case that is compiled, or is not, is given at least; later ones what the longest took."""

PROFILE_SECONDS = 12.0
RESERVE = 3.0


def run(part: Part) -> str:
    """Measure, case by case, and return the line for the summary.

    Raises:
        Failed: With that line, if a case raised an error, or none was measured.
    """
    quieten()
    start()
    try:
        Cases(part).run()
    finally:
        dist.destroy_process_group()
    if not is_good(part.found):
        raise Failed(verdict(part.found))
    return verdict(part.found)


class Cases:
    """The cases of a run, of which those on the same model share its engine."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.sizes = TOY if part.rehearse else REAL
        self.benches: dict[str, Bench] = {}
        self.held: dict[str, float] = {}
        self.memory = memory_for(part.device)
        self.found: dict[str, Any] = {}
        self.longest: dict[bool, float] = {}
        part.record(toy=part.rehearse, accumulation=ACCUMULATION)

    def run(self) -> None:
        """Measure all that fit; one that fails takes nothing from the next."""
        for case in CASES:
            if self.part.left() < RESERVE + self.needed(case):
                continue
            began = time.monotonic()
            try:
                self.found[case.name] = self.measure(case)
            except Exception as error:  # of the device, the compiler, the profiler
                self.found[case.name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            self.longest[case.compiled] = max(self.longest.get(case.compiled, 0.0), time.monotonic() - began)
            self.part.record(cases=self.found)

    def needed(self, case: Case) -> float:
        """Seconds that a case will take, about."""
        if self.part.rehearse:
            return 0.0
        longest = self.longest.get(case.compiled)
        return FIRST_SECONDS[case.compiled] if longest is None else 1.2 * longest

    def measure(self, case: Case) -> dict[str, Any]:
        """One case, with the largest micro-batch that the plan, and then the device, has room for."""
        bench = self.bench(case)
        length = case.length // self.sizes.shortening
        others = sum(held for size, held in self.held.items() if size != case.size)
        plan = bench.plan(length, self.memory - others)
        self.held[case.size] = sum(part.bytes for part in plan.memory if part.held)
        micro, refused = plan.micro, list[int]()
        with compiled_or_not(case.compiled):
            while True:
                try:
                    return self.at(bench, case, micro, length) | {
                        "planned_bytes": plan.total + others,  # as the peak has it
                        "too_large": refused,
                    }
                except torch.OutOfMemoryError:
                    refused.append(micro)
                if micro <= 1:
                    raise RuntimeError(
                        f"out of memory at micro-batches of {refused}, of which {plan.micro} was planned"
                    )
                micro //= 2
                self.clear(bench)

    def bench(self, case: Case) -> Bench:
        """The engine of the case's model."""
        if case.size not in self.benches:
            self.benches[case.size] = build(case, self.sizes)
        return self.benches[case.size]

    def at(self, bench: Bench, case: Case, micro: int, length: int) -> dict[str, Any]:
        """A case with this micro-batch."""
        bench.engine.set_batch_plan(BatchPlan(micro, ACCUMULATION, 1))
        batches = bench.batches(micro, length)
        found = {"micro_batch": micro, **measure_updates(bench, batches)}
        self.part.record(cases={**self.found, case.name: found})  # before the profiler, which may not end
        peak = peak_of(bench.engine.device, "bf16", None)
        found["utilisation"] = None if peak is None else found["model_flops_per_second"] / peak
        short = found["utilisation"] is None or found["utilisation"] < GOAL
        if short and (self.part.rehearse or self.part.left() > RESERVE + PROFILE_SECONDS):
            try:
                found["kernels"] = kernels(bench, batches)
            except Exception as error:  # its own memory, or no right to profile; what was measured stands
                found["kernels_missing"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return found

    def clear(self, bench: Bench) -> None:
        """Give back what an update that did not fit has left."""
        engine: Any = bench.engine
        engine.engine.optimizer.zero_grad()  # DeepSpeed's: gradients of bf16 weights, and their sums
        if self.part.device == "cuda":
            torch.cuda.empty_cache()
