"""The phases of a run: how long they are, what each trains on, at which rate, and what the second one takes over."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ..rules.global_batch import BatchPlan, plan_batch
from ..rules.schedules import (
    FactorLR,
    resolve_warmup,
    warmup_exponential,
    warmup_polynomial,
    warmup_stable_decay,
)
from .config import RecipeConfig, ScheduleConfig, sequences_in


@dataclass(frozen=True)
class Phase:
    """Consecutive updates with one sequence length and one global batch.

    Attributes:
        number: 1 or 2.
        first: updates done before the phase.
        steps: updates of the phase.
        sequence_length: tokens per sequence.
        global_batch: sequences per update over all ranks.
        micro_batch: sequences per rank and forward pass.
        sequences_before: sequences read before the phase.
        global_rope_theta: base of the rotary positions in ModernBERT's global layers; None of BERT, which has none.
    """

    number: int
    first: int
    steps: int
    sequence_length: int
    global_batch: int
    micro_batch: int
    sequences_before: int
    global_rope_theta: float | None = None

    @property
    def last(self) -> int:
        """Updates done when the phase ends."""
        return self.first + self.steps

    @property
    def sequences(self) -> int:
        """Sequences that the phase reads."""
        return self.steps * self.global_batch

    def updates(self, duration: float, unit: str, whole: bool = True) -> float:
        """Return a duration of a schedule in updates of the global batch, see `duration_in_sequences`.

        Args:
            duration: not negative.
            unit: of `UNITS`.
            whole: to the nearest number; else with the fraction, which means something to updates of smaller batches.
        """
        if not whole:
            return self.duration_in_sequences(duration, unit) / self.global_batch
        if duration < 1 or unit == "updates":
            return resolve_warmup(duration, self.steps)
        return round(self.duration_in_sequences(duration, unit) / self.global_batch)

    def duration_in_sequences(self, duration: float, unit: str) -> float:
        """Return a duration in sequences: below 1 it is a share of the phase, from 1 on a number in `unit`.

        Args:
            duration: not negative.
            unit: "updates" of the global batch, "sequences" or "tokens".
        """
        if duration < 1:
            return duration * self.sequences
        return duration * sequences_in(unit, self.global_batch, self.sequence_length)

    def plan(self, ranks: int) -> BatchPlan:
        """Return the phase's batch division; see `plan_batch` for the error."""
        option = "--micro_batch " if self.number == 1 else "phase_two.micro_batch="
        return plan_batch(self.global_batch, self.micro_batch, ranks, option)


def phases_of(config: RecipeConfig) -> tuple[Phase, ...]:
    """Return the one or two phases of a configuration."""
    training, second = config.training, config.phase_two
    base = config.model.global_rope_theta if config.model.architecture == "modernbert" else None
    one = Phase(
        number=1,
        first=0,
        steps=training.steps,
        sequence_length=config.data.sequence_length,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        sequences_before=0,
        global_rope_theta=base,
    )
    if not second.steps:
        return (one,)
    two = Phase(
        number=2,
        first=training.steps,
        steps=second.steps,
        sequence_length=second.sequence_length,
        global_batch=second.global_batch,
        micro_batch=second.micro_batch,
        sequences_before=training.steps * training.global_batch,
        global_rope_theta=base if second.global_rope_theta is None else second.global_rope_theta,
    )
    return (one, two)


def total_steps(config: RecipeConfig) -> int:
    """Return the updates of all phases."""
    return phases_of(config)[-1].last


def scheduled_phases(config: RecipeConfig) -> tuple[Phase, ...]:
    """Return the phases that have a learning-rate schedule of their own: one as long as both if they share theirs."""
    phases = phases_of(config)
    if len(phases) == 1 or config.phase_two.reset_schedule:
        return phases
    return (dataclasses.replace(phases[0], steps=phases[-1].last),)


def in_whole_updates(config: RecipeConfig) -> bool:
    """Tell whether a schedule's durations are rounded to updates: not where the batch warms up, in smaller updates."""
    return not config.run.batch_warmup


def learning_rate(config: RecipeConfig, step: float) -> float:
    """Return the learning rate of the update number `step` of the run, counted from 0 over all phases.

    Where batches differ, `step` is the number of updates that as many sequences make with the phases' global batches.
    """
    phases, whole = scheduled_phases(config), in_whole_updates(config)
    if len(phases) == 1 or step < phases[1].first:
        return _phase_rate(config.schedule, config.optimizer.lr, step, phases[0], whole)
    return _phase_rate(schedule_of(config, 2), config.phase_two.lr, step - phases[1].first, phases[1], whole)


def schedule_of(config: RecipeConfig, phase: int) -> ScheduleConfig:
    """Return the schedule of phase 1 or 2, where the second one begins anew."""
    second = config.phase_two
    if phase == 1:
        return config.schedule
    return dataclasses.replace(
        config.schedule,
        warmup=second.warmup,
        warmup_start=0,
        constant=second.constant,
        cooldown=second.cooldown,
        decay_steps=second.decay_steps,
        offset=second.offset,
    )


def _phase_rate(schedule: ScheduleConfig, peak: float, step: float, phase: Phase, whole: bool) -> float:
    return peak * _phase_factor(schedule, step, phase, whole) + schedule.offset


def _phase_factor(schedule: ScheduleConfig, step: float, phase: Phase, whole: bool) -> float:
    durations = (schedule.warmup, schedule.constant, schedule.cooldown)
    warmup, constant, cooldown = (phase.updates(duration, schedule.unit, whole) for duration in durations)
    if schedule.shape == "exponential":
        return warmup_exponential(step, warmup, schedule.decay_rate, schedule.decay_steps)
    if schedule.shape == "wsd":
        return warmup_stable_decay(step, warmup, phase.steps, cooldown, schedule.final, schedule.cooldown_form)
    return warmup_polynomial(
        step,
        warmup,
        phase.steps,
        schedule.degree,
        schedule.final,
        constant,
        schedule.warmup_start,
        schedule.decay_from_start,
    )


class PhasedSchedule(FactorLR):
    """`learning_rate` as a scheduler: a function of the update's number, the border between phases included."""

    def __init__(self, optimizer: Optimizer, config: RecipeConfig, last_epoch: int = -1) -> None:
        """Schedule every group of an optimizer whose groups begin at `config.optimizer.lr`."""
        self.config = config
        super().__init__(optimizer, last_epoch)

    def factor(self, step: float) -> float:
        """Return the learning rate of update `step` over `optimizer.lr`."""
        return learning_rate(self.config, step) / self.config.optimizer.lr

    def state_dict(self) -> dict[str, Any]:
        """Return the position; the rest is the run's configuration."""
        return {"last_epoch": self.last_epoch}


def phased_schedule(config: RecipeConfig) -> Callable[[Optimizer], PhasedSchedule]:
    """Return a factory that puts the configuration's schedule on an optimizer; DeepSpeed takes such a factory."""
    return lambda optimizer: PhasedSchedule(optimizer, config)


def carry_over(optimizer: Optimizer, keep_moments: bool, reset_step: bool) -> None:
    """Apply the rule for the optimizer's state at the border between phases, in place.

    Args:
        optimizer: the one that is stepped, whatever wrapper holds it and however its state is sharded.
        keep_moments: leave the moments; else all state but the step counts is set to zero.
        reset_step: set the step counts to zero, so that bias correction begins anew.
    """
    for state in optimizer.state.values():
        for owner, name, value in _entries(state):
            if name == "step" and reset_step:
                owner[name] = torch.zeros_like(value) if isinstance(value, torch.Tensor) else type(value)(0)
            elif name != "step" and not keep_moments and isinstance(value, torch.Tensor):
                value.zero_()


def _entries(state: dict[str, Any]) -> list[tuple[dict[str, Any], str, Any]]:
    """Return (dict, name, value) of the state's leaves; a flat tensor's state has a dict of per-layer vectors."""
    leaves = []
    for name, value in state.items():
        leaves.extend(_entries(value) if isinstance(value, dict) else [(state, name, value)])
    return leaves


def describe_plan(config: RecipeConfig, ranks: int) -> list[str]:
    """Return the lines that are printed before a run: batches, updates and rates of each phase, and what carries over.

    Raises:
        RecipeError: a global batch that cannot be divided.
    """
    lines = []
    for phase in phases_of(config):
        head = f"phase {phase.number}: " if config.phase_two.steps else ""
        lines.append(head + phase.plan(ranks).describe(phase.sequence_length))
        if not config.phase_two.steps:
            continue
        peak = peak_update(config, phase)
        first, highest, last = (learning_rate(config, step) for step in (phase.first, peak, phase.last - 1))
        lines.append(
            f"  updates {phase.first + 1:,} to {phase.last:,}; learning rate {first:.3g}, "
            f"highest {highest:.3g} at update {peak + 1:,}, {last:.3g} at the end"
        )
    if config.phase_two.steps:
        lines.append(describe_border(config))
    return lines


def peak_update(config: RecipeConfig, phase: Phase) -> int:
    """Return the update of the highest rate: the first that is not followed by a higher one, in any number of them."""

    def is_over(step: int) -> bool:
        return learning_rate(config, step + 1) <= learning_rate(config, step)

    return phase.first + bisect.bisect_left(range(phase.first, phase.last - 1), True, key=is_over)


def describe_border(config: RecipeConfig) -> str:
    """Return the line that says what the second phase takes over."""
    second, bases = config.phase_two, [phase.global_rope_theta for phase in phases_of(config)]
    rotary = [f"global rotary base {bases[0]:g} becomes {bases[-1]:g}"] if bases[0] != bases[-1] else []
    return "  from phase 1 to 2: " + "; ".join(
        (
            "weights kept",
            "moments kept" if second.keep_moments else "moments set to zero",
            "optimizer's step count begins anew" if second.reset_step else "optimizer's step count goes on",
            "learning rate begins anew with its own warm-up"
            if second.reset_schedule
            else "one learning-rate schedule over both phases",
            *rotary,
        )
    )
