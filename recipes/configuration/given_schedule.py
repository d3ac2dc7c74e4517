"""What a command line makes of a preset's schedule: durations in another unit than theirs, fields without effect."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..common.errors import RecipeError
from .config import RecipeConfig, batch_and_length, sequences_in

_SHAPES_OF = {
    "warmup_start": ("polynomial",),
    "constant": ("polynomial",),
    "degree": ("polynomial",),
    "decay_from_start": ("polynomial",),
    "final": ("polynomial", "wsd"),
    "decay_rate": ("exponential",),
    "decay_steps": ("exponential",),
    "cooldown": ("wsd",),
    "cooldown_form": ("wsd",),
}
"""The shapes of a schedule that a field means something to; all others are of every shape."""

_DURATIONS = ("warmup", "constant", "cooldown")


def check_given_schedule(base: RecipeConfig, config: RecipeConfig, given: Collection[str]) -> None:
    """Check the schedule that a command line makes of a preset, or of a saved configuration.

    Args:
        base: the preset.
        config: with what the command line set.
        given: names of the fields that it set.

    Raises:
        RecipeError: another unit for durations that are the preset's, or a field that the schedule's shape does not
            have; both are named, with what to give.
    """
    _require_effect(base, config, given)
    _require_unit(base, config, given)


def _require_unit(base: RecipeConfig, config: RecipeConfig, given: Collection[str]) -> None:
    old, new = base.schedule.unit, config.schedule.unit
    if old == new:
        return
    left = {key: value for key, value in _durations(config) if key not in given and value >= 1}
    if left:
        listed = ", ".join(f"{key}={value:g}" for key, value in left.items())
        instead = " ".join(f"{key}={_converted(config, key, old, new):.17g}" for key in left)
        raise RecipeError(
            f"schedule.unit={new} and {listed} of {base.preset!r}, which counts in {old}, contradict each other: give "
            f"durations in {new}, too; as long are {instead}"
        )


def _durations(config: RecipeConfig) -> Iterator[tuple[str, float]]:
    """Yield the fields that `schedule.unit` counts and that the schedule has, with their values."""
    fields = [name for name in _DURATIONS if _is_of(f"schedule.{name}", config.schedule.shape)]
    yield from ((f"schedule.{name}", getattr(config.schedule, name)) for name in fields)
    if config.phase_two.steps and config.phase_two.reset_schedule:
        yield from ((f"phase_two.{name}", getattr(config.phase_two, name)) for name in fields)
    yield "run.batch_warmup", config.run.batch_warmup


def _converted(config: RecipeConfig, key: str, old: str, new: str) -> float:
    of_phase = batch_and_length(config, 2 if key.startswith("phase_two") else 1)
    return round(_value(config, key) * sequences_in(old, *of_phase) / sequences_in(new, *of_phase), 6)


def _require_effect(base: RecipeConfig, config: RecipeConfig, given: Collection[str]) -> None:
    shape, usual = config.schedule.shape, RecipeConfig()
    fields = [f"schedule.{name}" for name in _SHAPES_OF]
    if config.phase_two.steps and config.phase_two.reset_schedule:
        fields += [f"phase_two.{name}" for name in _SHAPES_OF if hasattr(config.phase_two, name)]
    idle = [
        key
        for key in fields
        if not _is_of(key, shape)
        and _value(config, key) != _value(usual, key)
        and (key in given or _is_of(key, base.schedule.shape))
    ]
    if idle:
        listed = ", ".join(f"{key}={_shown(_value(config, key))}" for key in idle)
        defaults = " ".join(f"{key}={_shown(_value(usual, key))}" for key in idle)
        raise RecipeError(
            f"schedule.shape={shape} makes nothing of {listed}: choose another shape, or reset it to the default, "
            f"{defaults}"
        )


def _is_of(key: str, shape: str) -> bool:
    """Tell whether a field means something to a shape."""
    return shape in _SHAPES_OF.get(key.partition(".")[2], (shape,))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _value(config: RecipeConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
