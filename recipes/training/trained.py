"""How much of a run's plan a model had when it was saved, for its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..configuration.batch_growth import growths_of
from ..configuration.config import RecipeConfig, ScheduleConfig
from ..configuration.phases import (
    Phase,
    in_whole_updates,
    learning_rate,
    peak_update,
    phases_of,
    schedule_of,
    scheduled_phases,
)


class Reached(NamedTuple):
    """Where a model's last update began and ended, in updates of the phases' global batches."""

    begin: float
    end: float


def reached_by(config: RecipeConfig, step: int, last: Mapping[str, Any]) -> Reached:
    """Return how far a model came.

    Args:
        config: of the run.
        step: updates of the model.
        last: what the run recorded of its last update, or of an earlier one; then, where batches grow, the result is
            the least that it can be.
    """
    growths = growths_of(config)
    if not growths:
        return Reached(max(0, step - 1), step)
    least = growths[0].smallest
    if last.get("step") == step and "sequences" in last:
        ended = last["sequences"]
        return Reached(_position(config, ended - last.get("batch", least)), _position(config, ended))
    read = max(last.get("sequences", 0), (step - 1) * least)
    return Reached(_position(config, read), _position(config, read + least))


def _position(config: RecipeConfig, read: float) -> float:
    first, *rest = phases_of(config)
    if not rest or read < first.sequences:
        return max(0, read) / first.global_batch
    return first.last + (read - first.sequences) / rest[0].global_batch


def reached_phases(config: RecipeConfig, reached: Reached) -> list[Phase]:
    """Return the phases that a model's updates were of."""
    return [phase for phase in phases_of(config) if reached.begin >= phase.first]


def describe_rates(config: RecipeConfig, reached: Reached) -> str:
    """Say which parts of its schedules a model had, and the highest rates of its phases."""
    texts, peaks = [], []
    for phase in scheduled_phases(config):
        if reached.begin >= phase.first:
            texts.append(", ".join(_parts(config, phase, reached)))
            highest = min(peak_update(config, phase), reached.begin)
            peaks.append(f"{learning_rate(config, highest):.4g}")
    return f"{', then '.join(dict.fromkeys(texts))}; at most {', then '.join(peaks)}"


def _parts(config: RecipeConfig, phase: Phase, reached: Reached) -> Iterator[str]:
    """Yield the parts of a phase's schedule that a model had."""
    schedule, whole = schedule_of(config, phase.number), in_whole_updates(config)
    durations = (schedule.warmup, schedule.constant, schedule.cooldown)
    warmup, constant, cooldown = (phase.updates(duration, schedule.unit, whole) for duration in durations)
    if schedule.shape == "polynomial":
        warmup += schedule.warmup_start  # updates of it that the phase has
    into = min(reached.begin, phase.last - 1) - phase.first
    over, unended = into + 1 >= warmup, "" if reached.end >= phase.last else ", not to its end"
    if warmup > 0:
        kind = "quadratic" if schedule.shape == "exponential" else "linear"
        yield f"{kind} warm-up{'' if over else unended}"
    if over and schedule.shape == "wsd":
        yield "peak"
        yield _cooldown(schedule, into - (phase.steps - cooldown), unended) if cooldown else "no cooldown"
    elif over and schedule.shape == "polynomial":
        yield from ["plateau"] * bool(constant)
        if into - warmup > (-1 if schedule.decay_from_start else constant):
            yield f"decay (1 - p)^{schedule.degree:g} to {schedule.final:g} of the peak{unended}"
    elif into > warmup:
        yield f"x{schedule.decay_rate:g} every {schedule.decay_steps:g} updates"


def _cooldown(schedule: ScheduleConfig, past: float, unended: str) -> str:
    if past <= 0:
        return "before its cooldown"
    return f"{schedule.cooldown_form} cooldown to {schedule.final:g} of the peak{unended}"


def describe_end(config: RecipeConfig, reached: Reached) -> Iterator[str]:
    """Yield the line that says what a model lacks of its run's plan, if it does."""
    phases = phases_of(config)
    if reached.end >= phases[-1].last:
        return
    of = f", in phase {len(reached_phases(config, reached))} of {len(phases)}" if len(phases) > 1 else ""
    batch = " of the global batch" if growths_of(config) else ""
    yield f"- Saved before the end of its run{of}: {phases[-1].last:,} updates{batch} were planned."
