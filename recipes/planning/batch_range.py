"""What a plan says of batches that grow: from where to where, how many updates, how long."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..common.errors import RecipeError
from ..common.reporter import clock
from ..configuration.batch_growth import Growth, growths_of, updates_of
from ..configuration.config import RecipeConfig
from .demands import check_first_groups, compares_growing_groups
from .memory import ModelSize
from .phase_plan import Machine, PhasePlan, plan_phase


@dataclass(frozen=True)
class BatchRange:
    """The batches of a phase that grow, on the GPUs of its plan.

    Attributes:
        smallest, largest: sequences per update.
        fewest_updates, most_updates: of the phase.
        least_hours, most_hours: estimated, of the phase if every batch were the largest or the smallest; the same two
            times of a warm-up.
        problem: why the GPUs cannot share these batches out, or "".
        warmup: sequences over which the batch grows; 0 of a phase without that, None where the gradient noise decides.
    """

    smallest: int
    largest: int
    fewest_updates: int
    most_updates: int
    least_hours: float
    most_hours: float
    problem: str = ""
    warmup: int | None = None

    def describe(self) -> Iterator[str]:
        """Yield the lines of the plan."""
        if self.warmup == 0 and not self.problem:
            return
        name = "batch from the gradient noise" if self.warmup is None else "batch warm-up"
        yield f"  {name}: {self.smallest:,} to {self.largest:,} sequences"
        if self.problem:
            yield f"    {self.problem}"
            return
        if self.warmup is not None:
            yield (
                f"    over the first {self.warmup:,} sequences; {self.most_updates:,} updates; phase: "
                f"{clock(self.most_hours * 3600)}; everything else here is of the global batch"
            )
            return
        yield (
            f"    {self.fewest_updates:,} to {self.most_updates:,} updates; phase: {clock(self.least_hours * 3600)} to "
            f"{clock(self.most_hours * 3600)}; everything else here is of the global batch"
        )


def shared_micro_batches(size: ModelSize, config: RecipeConfig, gpus: int, machine: Machine) -> tuple[int | None, ...]:
    """Return the largest micro-batch of each phase that fits and divides all its batches; None where that is free.

    Args:
        size: of the model.
        config: of the run.
        gpus: that share a batch out.
        machine: memory.
    """
    shared = []
    for growth in growths_of(config):
        common = math.gcd(*growth.sizes)
        compared = config.run.batch_from_noise or (growth.warmup and compares_growing_groups(config))
        if compared and gpus == 1 and common % 2 == 0:  # two micro-batches at least, whose gradients are compared
            common //= 2
        phase = dataclasses.replace(growth.phase, global_batch=common)
        plan = plan_phase(size, config, phase, gpus, machine)
        shared.append(plan.micro if not plan.problem else None)
    return tuple(shared)


def batch_ranges(
    size: ModelSize, config: RecipeConfig, plans: Sequence[PhasePlan], machine: Machine
) -> list[BatchRange]:
    """Return the range of each phase's batches; [] of a run whose batches stay.

    Args:
        size: of the model.
        config: of the run.
        plans: of its phases.
        machine: memory and assumptions.

    Raises:
        RecipeError: what `growths_of` refuses.
    """
    ranges = []
    for growth, updates, plan in zip(growths_of(config), updates_of(config), plans, strict=False):
        micro = max(1, plan.micro)

        def seconds(batch: int, growth: Growth = growth, plan: PhasePlan = plan, micro: int = micro) -> float:
            phase = dataclasses.replace(growth.phase, global_batch=batch)
            return plan_phase(size, config, phase, plan.gpus, machine, micro).step

        problem = _problem(config, growth, micro, plan.gpus)
        warmup = None if config.run.batch_from_noise else growth.warmup or 0
        hours = _hours(growth, updates[1], seconds(growth.smallest), seconds(growth.largest), warmup is None)
        ranges.append(BatchRange(growth.smallest, growth.largest, *updates, *hours, problem, warmup))
    return ranges


def _hours(growth: Growth, updates: int, shortest: float, longest: float, by_noise: bool) -> tuple[float, float]:
    """Return the hours of a phase if every batch were the largest, and the smallest; of a warm-up twice its own.

    Args:
        growth: of the phase.
        updates: of it, at the most.
        shortest: seconds of an update of the smallest batch.
        longest: seconds of one of the largest.
        by_noise: the batches follow the gradient noise.
    """
    sequences, smallest, largest = growth.phase.sequences, growth.smallest, growth.largest
    if by_noise:
        return sequences / largest * longest / 3600, sequences / smallest * shortest / 3600
    # An update takes a time for itself, and a time for each of its sequences.
    each = (longest - shortest) / (largest - smallest) if largest > smallest else longest / largest
    own = longest - each * largest
    return ((updates * own + sequences * each) / 3600,) * 2


def _problem(config: RecipeConfig, growth: Growth, micro: int, gpus: int) -> str:
    phase = dataclasses.replace(growth.phase, micro_batch=micro)
    try:
        smallest = dataclasses.replace(growth, phase=phase).plan(gpus)
        if growth.warmup:
            check_first_groups(config, smallest)
    except RecipeError as error:
        return str(error)
    one = config.run.batch_from_noise and smallest.accumulation * gpus == 1
    return "the noise is that between two micro-batches at least: halve the micro-batch" if one else ""
