"""Which values a configuration may have."""

from __future__ import annotations

import math
from typing import Any

from ..common.errors import RecipeError
from .config import PRECISIONS, SHAPES, RecipeConfig


def check_ranges(config: RecipeConfig) -> None:
    """Check every number against its range.

    Raises:
        RecipeError: names the field, its value and its range.
    """
    positive = [
        *(f"model.{n}" for n in ("layers", "hidden", "heads", "intermediate", "max_positions")),
        *(f"data.{n}" for n in ("vocabulary", "validation_sequences")),
        *(f"training.{n}" for n in ("global_batch", "micro_batch", "steps")),
        *(f"run.{n}" for n in ("log_every", "print_every", "keep_checkpoints")),
    ]
    for key in positive:
        _require(config, key, lambda v: v >= 1, "at least 1")
    for key in ("run.validate_every", "run.checkpoint_every"):
        _require(config, key, lambda v: v >= 0, "0 (only at the end) or more")
    limit = config.model.max_positions
    _require(config, "data.sequence_length", lambda v: 4 <= v <= limit, f"4 to model.max_positions={limit}")
    _require(config, "data.mask_probability", lambda v: 0 < v < 1, "above 0 and below 1")
    _require(config, "data.workers", lambda v: v is None or v >= 0, "0 (none) or more")
    _require(config, "data.validation_fraction", lambda v: 0 < v < 1, "above 0 and below 1")
    _require(config, "model.dropout", lambda v: 0 <= v < 1, "0 to below 1")
    _require(config, "optimizer.lr", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "optimizer.weight_decay", lambda v: v >= 0 and math.isfinite(v), "finite and not negative")
    _require(config, "schedule.shape", lambda v: v in SHAPES, ", ".join(SHAPES))
    _require(config, "schedule.warmup", lambda v: 0 <= v <= config.training.steps, "0 to training.steps")
    _require(config, "schedule.warmup_start", lambda v: v <= 0, "0 or less: updates of warm-up that lie before the run")
    _require(config, "schedule.constant", lambda v: 0 <= v <= config.training.steps, "0 to training.steps")
    _require(config, "schedule.degree", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "schedule.final", lambda v: 0 <= v <= 1, "0 to 1")
    _require(config, "schedule.decay_rate", lambda v: 0 < v <= 1, "above 0, at most 1")
    _require(config, "schedule.decay_steps", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "schedule.offset", lambda v: v >= 0 and math.isfinite(v), "finite and not negative")
    if config.schedule.decay_from_start and config.schedule.constant:
        raise RecipeError(
            f"schedule.constant={config.schedule.constant} and schedule.decay_from_start contradict each other: a "
            "decay that counts from the start has no plateau; set one of them"
        )
    _require(config, "training.zero_stage", lambda v: v in (0, 1, 2, 3), "0, 1, 2 or 3")
    _require(config, "training.gradient_clipping", lambda v: v >= 0, "0 (no clipping) or more")
    _require(config, "training.precision", lambda v: v in (*PRECISIONS, "fp16"), ", ".join(PRECISIONS))
    _require(config, "run.peak_tflops", lambda v: v is None or v > 0, "above 0, or null: from a table of devices")
    if config.model.hidden % config.model.heads:
        raise RecipeError(
            f"model.hidden={config.model.hidden} is not divisible by model.heads={config.model.heads}; "
            "each head takes an equal share of the hidden size"
        )
    if config.phase_two.steps:
        _check_phase_two(config)


def _check_phase_two(config: RecipeConfig) -> None:
    limit, steps = config.model.max_positions, config.phase_two.steps
    _require(config, "phase_two.steps", lambda v: v >= 0, "0 (no second phase) or more")
    _require(config, "phase_two.sequence_length", lambda v: 4 <= v <= limit, f"4 to model.max_positions={limit}")
    _require(config, "phase_two.global_batch", lambda v: v >= 1, "at least 1")
    _require(config, "phase_two.micro_batch", lambda v: v >= 1, "at least 1")
    _require(config, "phase_two.lr", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "phase_two.warmup", lambda v: 0 <= v <= steps, "0 to phase_two.steps")
    _require(config, "phase_two.constant", lambda v: 0 <= v <= steps, "0 to phase_two.steps")
    _require(config, "phase_two.decay_steps", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "phase_two.offset", lambda v: v >= 0 and math.isfinite(v), "finite and not negative")


def _require(config: RecipeConfig, key: str, allowed: Any, description: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if not allowed(value):
        raise RecipeError(f"{key}={value!r} is out of range: allowed is {description}")
