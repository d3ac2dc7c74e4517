"""Which values a configuration may have."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial
from typing import Any

from ..common.command import MOST, MOST_SEED
from ..common.errors import RecipeError, shown
from .config import (
    ARCHITECTURES,
    ATTENTIONS,
    COOLDOWNS,
    MASKS,
    MASTERS,
    MODERNBERT_FIELDS,
    PRECISIONS,
    SHAPES,
    STATE_DTYPES,
    UNITS,
    ModelConfig,
    RecipeConfig,
)
from .phases import Phase, in_whole_updates, phases_of, scheduled_phases

MOST_TEXT = 2**53
"""The most documents or characters that can be asked for."""


def check_ranges(config: RecipeConfig) -> None:
    """Check every number against its range.

    Raises:
        RecipeError: names the field, its value and its range.
    """
    _check_whole_numbers(config)
    limit = config.model.max_positions
    _require(config, "data.sequence_length", lambda v: 4 <= v <= limit, _lengths(config))
    _require(config, "data.mask_probability", lambda v: 0 < v < 1, "above 0 and below 1")
    _require(config, "data.masks", lambda v: v in MASKS, ", ".join(MASKS))
    _require(config, "data.discard_smallest", lambda v: 0 <= v < 1, "0 (none) to below 1")
    _require(config, "data.validation_fraction", lambda v: 0 < v < 1, "above 0 and below 1")
    _require(config, "model.dropout", lambda v: 0 <= v < 1, "0 to below 1")
    _require(config, "model.architecture", lambda v: v in ARCHITECTURES, ", ".join(ARCHITECTURES))
    _require(config, "model.attention", lambda v: v in ATTENTIONS, ", ".join(ATTENTIONS))
    _require(config, "optimizer.lr", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "optimizer.weight_decay", _finite, "finite and not negative")
    _require(config, "schedule.shape", lambda v: v in SHAPES, ", ".join(SHAPES))
    _require(config, "schedule.unit", lambda v: v in UNITS, ", ".join(UNITS))
    _require(config, "schedule.cooldown_form", lambda v: v in COOLDOWNS, ", ".join(COOLDOWNS))
    _check_durations(config, "schedule", phases_of(config)[0])
    _require(config, "run.batch_warmup", lambda v: v >= 0 and math.isfinite(v), "finite, 0 (none) or more")
    _require(config, "schedule.warmup_start", lambda v: -MOST <= v <= 0, "0 or less: updates before the run")
    _require(config, "schedule.degree", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "schedule.final", lambda v: 0 <= v <= 1, "0 to 1")
    _require(config, "schedule.decay_rate", lambda v: 0 < v <= 1, "above 0, at most 1")
    _require(config, "schedule.decay_steps", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "schedule.offset", _finite, "finite and not negative")
    if config.schedule.decay_from_start and config.schedule.constant:
        raise RecipeError(
            f"schedule.constant={config.schedule.constant} and schedule.decay_from_start contradict each other: a "
            "decay that counts from the start has no plateau; set one of them"
        )
    _require(config, "training.zero_stage", lambda v: v in (0, 1, 2, 3), "0, 1, 2 or 3")
    _require(config, "training.gradient_clipping", _finite, "finite, 0 (no clipping) or more")
    _require(config, "training.precision", lambda v: v in PRECISIONS, ", ".join(PRECISIONS))
    _require(config, "training.state_dtype", lambda v: v in (None, *STATE_DTYPES), f"{', '.join(STATE_DTYPES)} or null")
    _require(config, "training.master", lambda v: v in (None, *MASTERS), f"{', '.join(MASTERS)} or null")
    _require(config, "run.hang_seconds", _is_patience, "0 or null (for ever), or a finite number from 1")
    _require(config, "run.noise_per_batch", lambda v: 0 < v < math.inf, "finite and above 0")
    _require(config, "run.peak_tflops", lambda v: v is None or 0 < v < math.inf, "above 0, or null: a table's")
    if config.model.hidden % config.model.heads:
        raise RecipeError(
            f"model.hidden={config.model.hidden} is not divisible by model.heads={config.model.heads}; "
            "each head takes an equal share of the hidden size"
        )
    _check_modernbert(config)
    _require(config, "phase_two.steps", lambda v: 0 <= v <= MOST, f"0 (no second phase) to {MOST}")
    for field in fields(config.phase_two):  # of no phase, too: the file that keeps them has no infinite numbers
        _require(config, f"phase_two.{field.name}", lambda v: not isinstance(v, float) or math.isfinite(v), "finite")
    if config.phase_two.steps:
        _check_phase_two(config)


def _check_whole_numbers(config: RecipeConfig) -> None:
    """Check sizes, counts and the seed; more than their largest is a slip of the pen that nothing could compute."""
    bounds = {
        "model.layers": (1, 1_000),
        "model.hidden": (1, 2**20),
        "model.heads": (1, 2**20),
        "model.intermediate": (1, 2**22),
        "model.max_positions": (1, 2**22),
        "model.global_attention_every": (1, 1_000),
        "model.local_attention": (2, 2**22),
        "data.vocabulary": (1, 2**24),
        "data.max_documents": (1, MOST_TEXT),
        "data.max_characters": (1, MOST_TEXT),
        "data.validation_sequences": (1, MOST),
        "data.workers": (0, 4096),
        "training.global_batch": (1, MOST),
        "training.micro_batch": (1, MOST),
        "training.steps": (1, MOST),
        "training.seed": (0, MOST_SEED),
        "run.log_every": (1, MOST),
        "run.print_every": (1, MOST),
        "run.validate_every": (0, MOST),
        "run.checkpoint_every": (0, MOST),
        "run.keep_checkpoints": (1, MOST),
        "run.most_skipped_updates": (1, MOST),
        "run.smallest_batch": (1, MOST),
        "run.largest_batch": (1, MOST),
        "run.batch_every": (1, MOST),
    }
    for key, (least, most) in bounds.items():
        _require(config, key, partial(_between, least, most), f"{least} to {most}")


def _check_modernbert(config: RecipeConfig) -> None:
    """Check the fields that ModernBERT alone has, and that nobody gives them for nothing."""
    model, usual = config.model, ModelConfig()
    if model.architecture == "modernbert":
        for name in ("model.global_rope_theta", "model.local_rope_theta", "phase_two.global_rope_theta"):
            _require(config, name, lambda v: v is None or 1 <= v <= 1e12, "1 to 1e12")
        _require(config, "model.local_attention", lambda v: v % 2 == 0, "an even number: half lies on either side")
        if model.hidden // model.heads % 2:
            raise RecipeError(
                f"model.hidden={model.hidden} over model.heads={model.heads} makes heads of "
                f"{model.hidden // model.heads}, and rotary positions turn pairs of numbers: choose an even width"
            )
        return
    for name in MODERNBERT_FIELDS:
        if getattr(model, name) != getattr(usual, name):
            raise _of_modernbert(f"model.{name}={getattr(model, name)}")
    if config.phase_two.global_rope_theta is not None:
        raise _of_modernbert(f"phase_two.global_rope_theta={config.phase_two.global_rope_theta}")


def _of_modernbert(given: str) -> RecipeError:
    return RecipeError(
        f"{given} has no effect in BERT, whose layers all attend to the whole sequence by learned positions: leave it "
        "out, or choose a ModernBERT by --model"
    )


def _between(least: int, most: int, value: int | None) -> bool:
    return value is None or least <= value <= most


def _is_patience(seconds: float | None) -> bool:
    return not seconds or 1 <= seconds < math.inf


def _finite(value: float) -> bool:
    return value >= 0 and math.isfinite(value)


def _check_durations(config: RecipeConfig, section: str, phase: Phase) -> None:
    """Check how long warm-up, plateau and cooldown of a phase are, each and together."""
    unit, steps = config.schedule.unit, f"{'training' if phase.number == 1 else 'phase_two'}.steps"
    most = phase.steps if unit == "updates" else phase.duration_in_sequences(phase.steps, "updates")
    most *= phase.sequence_length if unit == "tokens" else 1
    allowed = f"0 to {steps}" if unit == "updates" else f"0 to {most:.0f}, the {unit} of {steps}"
    for name in ("warmup", "constant", "cooldown"):
        _require(config, f"{section}.{name}", lambda v: 0 <= v <= most, allowed)
    part, scheduled = getattr(config, section), scheduled_phases(config)
    if unit != "updates":
        _require_an_update(config, section, phase)
    if config.schedule.shape != "wsd" or phase.number > len(scheduled):
        return
    whole, rounded = scheduled[phase.number - 1], in_whole_updates(config)
    rise, fall = (whole.updates(duration, unit, rounded) for duration in (part.warmup, part.cooldown))
    if rise + fall > whole.steps * (1 + 1e-12):  # of fractions that are 1 together, but for rounding
        raise RecipeError(
            f"{section}.warmup={part.warmup:g} and {section}.cooldown={part.cooldown:g} are {rise:g} and {fall:g} "
            f"updates, more than the {whole.steps} that there are: make one of them shorter"
        )


def _require_an_update(config: RecipeConfig, section: str, phase: Phase) -> None:
    """Check that no duration is too short to rate an update, which would be none at all."""
    unit = config.schedule.unit
    for name in ("warmup", "constant", "cooldown"):
        value = getattr(getattr(config, section), name)
        if value >= 1 and phase.updates(value, unit, whole=False) < 1 - 1e-12:
            least = phase.global_batch * (phase.sequence_length if unit == "tokens" else 1)
            raise RecipeError(
                f"{section}.{name}={value:g} {unit} is less than one update of {phase.global_batch:,} sequences, which "
                f"rates are of: give at least {least}, or 0 for none"
            )


def _lengths(config: RecipeConfig) -> str:
    """Say which sequence lengths the model takes; a --model may have changed the preset's architecture, hence limit."""
    model = config.model
    return f"4 to model.max_positions={model.max_positions} of this {ARCHITECTURES.get(model.architecture, 'model')}"


def _check_phase_two(config: RecipeConfig) -> None:
    limit = config.model.max_positions
    _require(config, "phase_two.sequence_length", lambda v: 4 <= v <= limit, _lengths(config))
    _require(config, "phase_two.global_batch", lambda v: 1 <= v <= MOST, f"1 to {MOST}")
    _require(config, "phase_two.micro_batch", lambda v: 1 <= v <= MOST, f"1 to {MOST}")
    _require(config, "phase_two.lr", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _check_durations(config, "phase_two", phases_of(config)[1])
    if config.schedule.unit != "updates" and not config.phase_two.reset_schedule:
        raise RecipeError(
            f"schedule.unit={config.schedule.unit} counts in sequences of one length, and phase_two.reset_schedule="
            "false makes one schedule of both phases: give its durations in updates, or as fractions"
        )
    _require(config, "phase_two.decay_steps", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "phase_two.offset", _finite, "finite and not negative")


def _require(config: RecipeConfig, key: str, allowed: Any, description: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if not allowed(value):
        if isinstance(value, float) and not math.isfinite(value) and "finite" not in description:
            description = f"a finite number, {description}"
        raise RecipeError(f"{key}={shown(value)} is out of range: allowed is {description}")
