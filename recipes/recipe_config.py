"""The configuration of a pretraining run: nested dataclasses, dotted overrides, and conversion to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trustratio.recipes.recipe_errors import RecipeError, unknown_name

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the BERT encoder. `max_positions` stays at 512 so that a later phase can use longer sequences."""

    layers: int = 2
    hidden: int = 128
    heads: int = 2
    intermediate: int = 512
    max_positions: int = 512
    dropout: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, packing and masking.

    `sources` holds files, globs and `hf:NAME` data sets; empty means the documentation of the installed packages.
    `tokenizer` is a local path or a hub name; None trains a WordPiece vocabulary of `vocabulary` tokens on the text.
    `validation_fraction` is a share of the documents, `validation_sequences` the most rows that a validation reads.
    """

    sources: tuple[str, ...] = ()
    text_column: str = "text"
    tokenizer: str | None = None
    vocabulary: int = 8192
    sequence_length: int = 32
    mask_probability: float = 0.15
    validation_fraction: float = 0.02
    validation_sequences: int = 2048


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer by name. `options` are passed to its constructor besides lr and weight decay."""

    name: str = "lamb"
    lr: float = 0.02
    weight_decay: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then polynomial decay of `degree` to `final` times the peak learning rate.

    `warmup` below 1 is a fraction of the steps, from 1 on a number of steps.
    """

    warmup: float = 0.1
    degree: float = 1.0
    final: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """Batch in sequences, number of optimizer steps (the schedule's length), precision, ZeRO stage and seed."""

    global_batch: int = 512
    micro_batch: int = 64
    steps: int = 340
    precision: str = "auto"
    zero_stage: int = 1
    gradient_clipping: float = 1.0
    seed: int = 1


@dataclass(frozen=True)
class RunConfig:
    """How often, in steps, a run logs, prints, validates and writes checkpoints (0: only at the end)."""

    log_every: int = 1
    print_every: int = 10
    validate_every: int = 20
    checkpoint_every: int = 100
    keep_checkpoints: int = 3


@dataclass(frozen=True)
class RecipeConfig:
    """Everything that decides what a run computes; printed at the start and saved in the output folder."""

    preset: str = "custom"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    run: RunConfig = RunConfig()

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, as they are written to JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def section_names() -> tuple[str, ...]:
    """Return the names that may stand before the dot of an override."""
    return tuple(f.name for f in dataclasses.fields(RecipeConfig) if f.name != "preset")


def is_override(text: str) -> bool:
    """Tell whether `text` has the form of a dotted override of this configuration (`optimizer.lr=0.01`)."""
    key, equals, _ = text.partition("=")
    section, dot, name = key.partition(".")
    return bool(equals and dot and name) and section in section_names()


def apply_overrides(config: RecipeConfig, overrides: Iterable[str]) -> RecipeConfig:
    """Return `config` with `section.field=value` overrides applied in order.

    Values are read as JSON and, failing that, as text. A field that `optimizer` does not have is an option of the
    optimizer itself (`optimizer.betas=[0.9,0.95]`).

    Raises:
        RecipeError: malformed override, unknown section or field (nearest names given), or a value of a wrong type.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            raise RecipeError(f"override {text!r} is not of the form section.field=value, e.g. optimizer.lr=0.01")
        if section not in section_names():
            raise unknown_name("configuration section", section, section_names())
        config = set_field(config, section, name, _read_value(value))
    return config


def set_field(config: RecipeConfig, section: str, name: str, value: Any) -> RecipeConfig:
    """Return `config` with one field of one section replaced; see `apply_overrides` for the errors."""
    part = getattr(config, section)
    types_of = typing.get_type_hints(type(part))
    if name in types_of:
        changed = dataclasses.replace(part, **{name: _coerce(f"{section}.{name}", value, types_of[name])})
    elif section == "optimizer":
        changed = dataclasses.replace(part, options={**part.options, name.removeprefix("options."): value})
    else:
        raise unknown_name(f"field of {section}", name, types_of)
    return dataclasses.replace(config, **{section: changed})


def from_dict(values: Mapping[str, Any]) -> RecipeConfig:
    """Rebuild a configuration from `RecipeConfig.to_dict`, checking names and types."""
    config = RecipeConfig(preset=str(values.get("preset", "custom")))
    for section, fields in values.items():
        if section == "preset":
            continue
        if section not in section_names():
            raise unknown_name("configuration section", section, section_names())
        for name, value in fields.items():
            config = set_field(config, section, name, value)
    return config


def load_config(path: Path) -> RecipeConfig:
    """Read a configuration that a run saved.

    Raises:
        RecipeError: the file is missing, unreadable or no configuration.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the run's configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a run's configuration: expected a JSON object")
    return from_dict(values)


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
    _require(config, "data.validation_fraction", lambda v: 0 < v < 1, "above 0 and below 1")
    _require(config, "model.dropout", lambda v: 0 <= v < 1, "0 to below 1")
    _require(config, "optimizer.lr", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "optimizer.weight_decay", lambda v: v >= 0 and math.isfinite(v), "finite and not negative")
    _require(config, "schedule.warmup", lambda v: 0 <= v <= config.training.steps, "0 to training.steps")
    _require(config, "schedule.degree", lambda v: v > 0 and math.isfinite(v), "finite and above 0")
    _require(config, "schedule.final", lambda v: 0 <= v <= 1, "0 to 1")
    _require(config, "training.zero_stage", lambda v: v in (0, 1, 2, 3), "0, 1, 2 or 3")
    _require(config, "training.gradient_clipping", lambda v: v >= 0, "0 (no clipping) or more")
    _require(config, "training.precision", lambda v: v in (*PRECISIONS, "fp16"), ", ".join(PRECISIONS))
    if config.model.hidden % config.model.heads:
        raise RecipeError(
            f"model.hidden={config.model.hidden} is not divisible by model.heads={config.model.heads}; "
            "each head takes an equal share of the hidden size"
        )


def _require(config: RecipeConfig, key: str, allowed: Any, description: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if not allowed(value):
        raise RecipeError(f"{key}={value!r} is out of range: allowed is {description}")


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)


def _coerce(key: str, value: Any, expected: Any) -> Any:
    """Convert `value` to the annotated type of a field, strictly: 3.5 is no int and true is no number."""
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        expected = next(t for t in typing.get_args(expected) if t is not type(None))
    if origin is tuple and isinstance(value, str):
        return (value,)
    if origin is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if expected is int and not isinstance(value, bool) and isinstance(value, int | float) and int(value) == value:
        return int(value)
    if expected is str and isinstance(value, str | int | float):
        return str(value)
    name = getattr(expected, "__name__", str(expected)) if origin is None else str(expected)
    raise RecipeError(f"{key} takes a value of type {name}, given was {value!r}")
