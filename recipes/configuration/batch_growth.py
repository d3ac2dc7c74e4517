"""Batches that grow, by the gradient noise scale or in a warm-up: how large they may be, in how many updates.

A phase trains on as many sequences as it would with its own global batch, `steps` x `global_batch`, in fewer or more
updates; its last update takes what is left. The learning rate of an update is the one that the schedule has after as
many sequences. In the second phase, smallest and largest batch are to its global batch what those of the first are to
the first's; it goes on with as many doublings, and averages the noise of its own sequences anew. A warm-up is of the
first phase alone: the second one has its global batch from the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..common.errors import RecipeError
from ..rules.batch_warmup import BatchWarmup
from ..rules.global_batch import BatchPlan, plan_batch
from ..rules.noise_batch import BatchFromNoise, fewest_updates
from .config import RecipeConfig
from .phases import Phase, describe_border, phases_of, total_steps


@dataclass(frozen=True)
class Growth:
    """Between which batches a phase grows.

    Attributes:
        phase: the phase.
        smallest, largest: sequences per update.
        warmup: sequences over which it grows; None where the gradient noise decides.
    """

    phase: Phase
    smallest: int
    largest: int
    warmup: int | None = None

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

    def schedule(self) -> BatchWarmup:
        """Return what says the phase's batches in a warm-up; of a phase without, the same one always."""
        return BatchWarmup(self.smallest, self.largest, self.warmup or 1)


def growths_of(config: RecipeConfig) -> tuple[Growth, ...]:
    """Return the range of each phase's batch; () of a run whose batches stay.

    Raises:
        RecipeError: a range that is empty or holds one batch, of a phase too short for it, or given for nothing.
    """
    run, first = config.run, phases_of(config)[0].global_batch
    if run.batch_warmup:
        return _warmed_up(config)
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


def _warmed_up(config: RecipeConfig) -> tuple[Growth, ...]:
    """Return the range of each phase's batch where the first one's is warmed up."""
    run, (first, *rest) = config.run, phases_of(config)
    option = f"run.batch_warmup={run.batch_warmup:g}"
    sequences = round(first.duration_in_sequences(run.batch_warmup, config.schedule.unit))
    if run.batch_from_noise:
        raise RecipeError(f"{option} and run.batch_from_noise=true both say how the batch grows: leave one of them out")
    if run.largest_batch is not None:
        raise RecipeError(
            f"{option} grows to the global batch of {first.global_batch}: leave run.largest_batch={run.largest_batch} "
            "out, or set training.global_batch"
        )
    if run.smallest_batch is None or run.smallest_batch >= first.global_batch:
        given = "is not given" if run.smallest_batch is None else f"is {run.smallest_batch}"
        raise RecipeError(
            f"{option} grows from run.smallest_batch, which {given}, to the global batch: give one below "
            f"{first.global_batch}"
        )
    if not 1 <= sequences <= first.sequences:
        raise RecipeError(
            f"{option} in {config.schedule.unit} is {sequences:,} sequences, and the first phase has "
            f"{first.sequences:,}: a warm-up ends in the first phase; below 1 it is a share of it"
        )
    growing = Growth(first, run.smallest_batch, first.global_batch, sequences)
    return (growing, *(Growth(phase, phase.global_batch, phase.global_batch) for phase in rest))


def _require_none(config: RecipeConfig) -> None:
    for name in ("smallest_batch", "largest_batch"):
        if getattr(config.run, name) is not None:
            raise RecipeError(
                f"run.{name}={getattr(config.run, name)} has no effect without run.batch_from_noise=true"
                + (" or run.batch_warmup" if name == "smallest_batch" else "")
            )


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
        if config.run.batch_warmup:
            ranges.append((growth.schedule().updates(growth.phase.sequences),) * 2)
            continue
        rule = growth.rule(config)
        rule.doublings = doublings
        fewest, doublings = fewest_updates(growth.phase.sequences, rule)
        ranges.append((fewest, math.ceil(growth.phase.sequences / growth.smallest)))
    return ranges


def most_updates(config: RecipeConfig) -> int:
    """Return the updates of all phases, where the gradient noise decides over batches the most that there can be."""
    ranges = updates_of(config)
    return sum(most for _, most in ranges) if ranges else total_steps(config)


def describe_growth(config: RecipeConfig, ranks: int) -> Iterator[str]:
    """Yield the lines of a plan that say what batches each phase may have.

    Raises:
        RecipeError: what `Growth.plan` and `growths_of` refuse.
    """
    run = config.run
    for growth, updates in zip(growths_of(config), updates_of(config), strict=True):
        head = f"phase {growth.phase.number}: " if config.phase_two.steps else ""
        describe = _describe_noise if run.batch_from_noise else _describe_warmup
        first, *more = describe(growth, updates, ranks)
        yield head + first
        yield from more
    if run.batch_from_noise:
        yield (
            f"  it doubles where the noise scale is at least {run.noise_per_batch:g} x the batch, looked at every "
            f"{run.batch_every:,} updates"
        )
    if config.phase_two.steps:
        yield describe_border(config)


def _describe_noise(growth: Growth, updates: tuple[int, int], ranks: int) -> Iterator[str]:
    fewest, most = updates
    yield f"batch from the gradient noise: {_describe_range(growth, ranks)}"
    yield f"  {growth.phase.sequences:,} sequences in {fewest:,} to {most:,} updates ({_in_full_batches(growth.phase)})"


def _describe_warmup(growth: Growth, updates: tuple[int, int], ranks: int) -> Iterator[str]:
    phase = growth.phase
    if growth.warmup is None:
        yield growth.plan(ranks).describe(phase.sequence_length)
        return
    yield f"batch warm-up: {_describe_range(growth, ranks)}"
    yield f"  in steps of {growth.smallest:,} over the first {growth.warmup:,} of {phase.sequences:,} sequences"
    yield f"  {updates[0]:,} updates ({_in_full_batches(phase)})"


def _describe_range(growth: Growth, ranks: int) -> str:
    smallest = growth.plan(ranks)
    largest = plan_batch(growth.largest, growth.phase.micro_batch, ranks)
    return (
        f"{growth.smallest:,} to {growth.largest:,} sequences = {smallest.micro} x {smallest.accumulation} to "
        f"{largest.accumulation} x {ranks}"
    )


def _in_full_batches(phase: Phase) -> str:
    return f"{phase.steps:,} of {phase.global_batch:,}, by which the learning rate is scheduled"
