"""The configuration of a pretraining run: nested dataclasses, dotted overrides, and conversion to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, unknown_name

PRECISIONS = ("auto", "fp32", "bf16")
SHAPES = ("polynomial", "exponential")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the BERT encoder. `max_positions` stays at 512 so that a later phase can use longer sequences.

    `initial_weights` is a folder in transformers' format whose weights training starts from; None: random ones.
    """

    layers: int = 2
    hidden: int = 128
    heads: int = 2
    intermediate: int = 512
    max_positions: int = 512
    dropout: float = 0.0
    initial_weights: str | None = None


MODEL_SIZES: dict[str, dict[str, int]] = {
    name: {"layers": layers, "hidden": hidden, "heads": hidden // 64, "intermediate": 4 * hidden}
    for name, layers, hidden in (
        ("tiny", 2, 128),
        ("mini", 4, 256),
        ("small", 4, 512),
        ("medium", 8, 512),
        ("base", 12, 768),
        ("large", 24, 1024),
    )
}
"""Sizes by name: base and large of Devlin et al. 2018 (arXiv 1810.04805), the rest of Turc et al. 2019 (1908.08962)."""


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, packing and masking.

    `sources` holds files, globs, `hf:NAME` data sets, or one folder that `prepare` wrote; empty means the
    documentation of the installed packages.
    `tokenizer` is a local path or a hub name; None trains a WordPiece vocabulary of `vocabulary` tokens on the text.
    `workers` processes per rank read and mask ahead; None: up to two where there is an accelerator, none on a CPU.
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
    workers: int | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer by name. `options` are passed to its constructor besides lr and weight decay."""

    name: str = "lamb"
    lr: float = 0.02
    weight_decay: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the updates of a phase.

    shape "polynomial": linear warm-up, a plateau of `constant`, then polynomial decay of `degree` to `final` times the
    peak. `decay_from_start` counts the decay from the phase's first update on, so that the warm-up hides its beginning;
    `warmup_start` is the update that the warm-up counts from (negative: it begins part of the way up).

    shape "exponential": quadratic warm-up, then the rate falls by the factor `decay_rate` every `decay_steps` updates
    (DeepSpeed's EE).

    `warmup` and `constant` below 1 are fractions of the steps, from 1 on numbers of steps. `offset` is added to the
    learning rate at every update.
    """

    shape: str = "polynomial"
    warmup: float = 0.1
    warmup_start: int = 0
    constant: float = 0.0
    degree: float = 1.0
    final: float = 0.0
    decay_from_start: bool = False
    decay_rate: float = 0.9
    decay_steps: float = 250.0
    offset: float = 0.0


@dataclass(frozen=True)
class PhaseTwoConfig:
    """A second phase with longer sequences, after `training.steps` updates; `steps` = 0 means there is none.

    What it takes over from the first phase is explicit: weights always; the optimizer's moments if `keep_moments`; its
    count of updates, which bias correction uses, begins anew if `reset_step`. With `reset_schedule` the learning rate
    begins anew too: `lr`, `warmup`, `constant`, `decay_steps` and `offset` are the second phase's, everything else of
    `schedule` holds for both. Without it, one schedule goes over the updates of both phases and these five are unused.
    """

    steps: int = 0
    sequence_length: int = 128
    global_batch: int = 192
    micro_batch: int = 24
    lr: float = 0.01
    warmup: float = 0.1
    constant: float = 0.0
    decay_steps: float = 250.0
    offset: float = 0.0
    keep_moments: bool = True
    reset_step: bool = True
    reset_schedule: bool = True


@dataclass(frozen=True)
class TrainingConfig:
    """Batch in sequences, number of optimizer steps (the schedule's length), precision, ZeRO stage and seed.

    `compile` runs the model through torch.compile; `activation_checkpointing` keeps only each encoder layer's input and
    computes the rest again in backward.
    """

    global_batch: int = 512
    micro_batch: int = 64
    steps: int = 340
    precision: str = "auto"
    zero_stage: int = 1
    gradient_clipping: float = 1.0
    seed: int = 1
    compile: bool = False
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class RunConfig:
    """How often, in steps, a run logs, prints, validates and writes checkpoints (0: only at the end).

    Every step is logged; `log_every` is how many steps' values are brought from the device together. `loggers` are
    "tensorboard" and "wandb", besides metrics.jsonl. `noise_scale` measures the gradient noise scale; None: where that
    is possible. `peak_tflops` is what one device can do at most, for the utilisation; None: from a table of devices.
    """

    log_every: int = 10
    print_every: int = 10
    validate_every: int = 20
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    loggers: tuple[str, ...] = ()
    noise_scale: bool | None = None
    peak_tflops: float | None = None


@dataclass(frozen=True)
class RecipeConfig:
    """Everything that decides what a run computes; printed at the start and saved in the output folder."""

    preset: str = "custom"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    phase_two: PhaseTwoConfig = PhaseTwoConfig()
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


def with_model_size(config: RecipeConfig, size: str) -> RecipeConfig:
    """Return `config` with the model's size replaced by one of `MODEL_SIZES`.

    Raises:
        RecipeError: there is no such size; the nearest names are given.
    """
    if size not in MODEL_SIZES:
        raise unknown_name("model size", size, MODEL_SIZES)
    for name, value in MODEL_SIZES[size].items():
        config = set_field(config, "model", name, value)
    return config


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


def _read_value(text: str) -> Any:
    if re.fullmatch(r"\[\s*[A-Za-z]\w*(\s*,\s*[A-Za-z]\w*)*\s*\]", text):  # a list of words needs no quotes
        return [word.strip() for word in text[1:-1].split(",")]
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
        origin = typing.get_origin(expected)
    if origin is tuple and isinstance(value, str):
        return (value,)
    if origin is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if expected is bool and isinstance(value, bool):
        return value
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if expected is int and not isinstance(value, bool) and isinstance(value, int | float) and int(value) == value:
        return int(value)
    if expected is str and isinstance(value, str | int | float):
        return str(value)
    name = getattr(expected, "__name__", str(expected)) if origin is None else str(expected)
    raise RecipeError(f"{key} takes a value of type {name}, given was {value!r}")
