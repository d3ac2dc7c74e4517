"""Batches that follow the gradient noise scale: how large each phase's may be, and how many updates that makes.

A phase trains on as many sequences as it would with its own global batch, `steps` x `global_batch`, in fewer or more
updates; its last update takes what is left. The learning rate of an update is the one that the schedule has after as
many sequences. In the second phase, smallest and largest batch are to its global batch what those of the first are to
the first's; it goes on with as many doublings, and averages the noise of its own sequences anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..common.errors import RecipeError
from ..rules.global_batch import BatchPlan, plan_batch
from ..rules.noise_batch import BatchFromNoise, fewest_updates
from .config import RecipeConfig
from .phases import Phase, describe_border, phases_of


@dataclass(frozen=True)
class Growth:
    """Between which batches a phase grows.

    Attributes:
        phase: the phase.
        smallest, largest: sequences per update.
    """

    phase: Phase
    smallest: int
    largest: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The batches that ranks have to share out: all others are made of these."""
        return self.smallest, self.largest, self.phase.global_batch

    def plan(self, ranks: int) -> BatchPlan:
        """Return the division of the smallest batch.

        Raises:
            RecipeError: micro-batch x ranks does not divide the smallest, the largest or the global batch.
        """
        self.phase.plan(ranks)
        self._divided("run.largest_batch", self.largest, ranks)
        return self._divided("run.smallest_batch", self.smallest, ranks)

    def _divided(self, option: str, batch: int, ranks: int) -> BatchPlan:
        unit = self.phase.micro_batch * ranks
        if batch % unit:
            raise RecipeError(
                f"{option} makes {batch} sequences in phase {self.phase.number}, not divisible by micro-batch "
                f"x ranks = {self.phase.micro_batch} x {ranks} = {unit}; {self._what_fits(ranks)}"
            )
        return plan_batch(batch, self.phase.micro_batch, ranks)

    def _what_fits(self, ranks: int) -> str:
        """Say which micro-batch divides all three batches, and leaves two groups in the smallest, if any does."""
        batches = (self.smallest, self.largest, self.phase.global_batch)
        fitting = [
            micro
            for micro in range(1, self.phase.micro_batch)
            if all(batch % (micro * ranks) == 0 for batch in batches) and self.smallest // micro > 1
        ]
        if fitting:
            return f"--micro_batch {max(fitting)} divides the smallest, the largest and the global batch"
        return f"choose multiples of {ranks} for the smallest and the largest batch"

    def rule(self, config: RecipeConfig) -> BatchFromNoise:
        """Return what chooses the phase's batches, at its smallest one."""
        run = config.run
        return BatchFromNoise(self.smallest, self.largest, every=run.batch_every, noise_per_batch=run.noise_per_batch)


def growths_of(config: RecipeConfig) -> tuple[Growth, ...]:
    """Return the range of each phase's batch; () of a run whose batches stay.

    Raises:
        RecipeError: a range that is empty or holds one batch, of a phase too short for it, or given for nothing.
    """
    run, first = config.run, phases_of(config)[0].global_batch
    if not run.batch_from_noise:
        _require_none(config)
        return ()
    smallest = first if run.smallest_batch is None else run.smallest_batch
    largest = first if run.largest_batch is None else run.largest_batch
    if smallest >= largest:
        raise RecipeError(
            f"run.batch_from_noise=true cannot grow from a smallest batch of {smallest} to a largest of {largest}: "
            f"give run.smallest_batch below, or run.largest_batch above, the global batch of {first}"
        )
    return tuple(
        Growth(phase, _scaled("smallest", smallest, first, phase), _scaled("largest", largest, first, phase))
        for phase in phases_of(config)
    )


def _require_none(config: RecipeConfig) -> None:
    for name in ("smallest_batch", "largest_batch"):
        if getattr(config.run, name) is not None:
            raise RecipeError(f"run.{name}={getattr(config.run, name)} has no effect without run.batch_from_noise=true")


def _scaled(name: str, batch: int, first: int, phase: Phase) -> int:
    """Return a batch of the first phase as as large a share of another phase's global batch."""
    scaled, rest = divmod(batch * phase.global_batch, first)
    if rest or not scaled:
        step = first // math.gcd(first, phase.global_batch)
        raise RecipeError(
            f"run.{name}_batch={batch} is {batch}/{first} of the first phase's global batch, and that share of phase "
            f"{phase.number}'s {phase.global_batch} is no whole number of sequences: use a multiple of {step}"
        )
    if scaled > phase.sequences:
        raise RecipeError(
            f"run.{name}_batch makes {scaled} sequences per update, and phase {phase.number} has {phase.sequences} in "
            "all: use a smaller one, or more steps"
        )
    return scaled


def updates_of(config: RecipeConfig) -> list[tuple[int, int]]:
    """Return the fewest and the most updates of each phase whose batch grows."""
    ranges, doublings = [], 0
    for growth in growths_of(config):
        rule = growth.rule(config)
        rule.doublings = doublings
        fewest, doublings = fewest_updates(growth.phase.sequences, rule)
        ranges.append((fewest, math.ceil(growth.phase.sequences / growth.smallest)))
    return ranges


def describe_growth(config: RecipeConfig, ranks: int) -> Iterator[str]:
    """Yield the lines of a plan that say what batches each phase may have.

    Raises:
        RecipeError: what `Growth.plan` and `growths_of` refuse.
    """
    run = config.run
    for growth, (fewest, most) in zip(growths_of(config), updates_of(config), strict=True):
        phase, smallest = growth.phase, growth.plan(ranks)
        largest = plan_batch(growth.largest, phase.micro_batch, ranks)
        head = f"phase {phase.number}: " if config.phase_two.steps else ""
        yield (
            f"{head}batch from the gradient noise: {growth.smallest:,} to {growth.largest:,} sequences = "
            f"{smallest.micro} x {smallest.accumulation} to {largest.accumulation} x {ranks}"
        )
        yield (
            f"  {phase.sequences:,} sequences in {fewest:,} to {most:,} updates ({phase.steps:,} of "
            f"{phase.global_batch:,}, by which the learning rate is scheduled)"
        )
    yield (
        f"  it doubles where the noise scale is at least {run.noise_per_batch:g} x the batch, looked at every "
        f"{run.batch_every:,} updates"
    )
    if config.phase_two.steps:
        yield describe_border(config)
