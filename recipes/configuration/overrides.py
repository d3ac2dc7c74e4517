"""Overrides such as `training.steps=100`, and configurations read back from files."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, shown, unknown_name
from ..common.files import parse_json, read_sealed
from .config import MODEL_SIZES, RecipeConfig

_FLAGS_OF_SECTIONS = {"model": "--model SIZE", "optimizer": "--optimizer NAME", "data": "--data SOURCE"}

_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "text or a list of texts",
    dict: 'a mapping such as {"name": 1}',
}
"""What the values of a field's type are called in messages."""

_NONE_IS_A_NAME = ("training.master",)
"""Fields that have a value called none, which is not null."""


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
        if equals and not name and section in section_names():
            raise _section_error(section)
        if not (equals and dot and name):
            raise RecipeError(f"override {shown(text)} is not of the form section.field=value, e.g. optimizer.lr=0.01")
        if section not in section_names():
            raise unknown_name("configuration section", section, section_names())
        named = key.strip() in _NONE_IS_A_NAME and value.strip().lower() == "none"
        config = set_field(config, section, name, "none" if named else _read_value(value))
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
    """Return `config` with the model's size, and with it the architecture, replaced by one of `MODEL_SIZES`.

    Raises:
        RecipeError: there is no such size; the nearest names are given.
    """
    if size not in MODEL_SIZES:
        raise unknown_name("model size", size, MODEL_SIZES)
    model, second = config.model.of_size(size), config.phase_two
    if model.architecture != config.model.architecture:
        second = dataclasses.replace(second, global_rope_theta=None)
    return dataclasses.replace(config, model=model, phase_two=second)


def from_dict(values: Mapping[str, Any]) -> RecipeConfig:
    """Rebuild a configuration from `RecipeConfig.to_dict`, checking names and types."""
    config = RecipeConfig(preset=str(values.get("preset", "custom")))
    for section, fields in values.items():
        if section == "preset":
            continue
        if section not in section_names():
            raise unknown_name("configuration section", section, section_names())
        if not isinstance(fields, Mapping):
            raise _section_error(section)
        for name, value in fields.items():
            config = set_field(config, section, name, value)
    return config


def load_config(path: Path) -> RecipeConfig:
    """Read a configuration that a run saved.

    Raises:
        RecipeError: the file is missing, unreadable or no configuration.
    """
    try:
        return from_dict(read_sealed(path))
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the run's configuration {path}: {error}") from error


def _section_error(section: str) -> RecipeError:
    fields = typing.get_type_hints(type(getattr(RecipeConfig(), section)))
    flag = f", or give {_FLAGS_OF_SECTIONS[section]}" if section in _FLAGS_OF_SECTIONS else ""
    return RecipeError(
        f"{section} is a section of the configuration and takes no value itself: set its fields "
        f"({', '.join(f'{section}.{name}' for name in fields)}){flag}"
    )


def _read_value(text: str) -> Any:
    if re.fullmatch(r"\[\s*[A-Za-z]\w*(\s*,\s*[A-Za-z]\w*)*\s*\]", text):  # a list of words needs no quotes
        return [word.strip() for word in text[1:-1].split(",")]
    try:
        return parse_json(text)
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
        return _as_float(key, value)
    if expected is int and isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0:
        return int(value)  # 3.0 and 1e4 too; the remainder of inf and NaN is NaN
    if expected is str and isinstance(value, str | int | float):
        return str(value)
    raise RecipeError(f"{key} takes {_IN_WORDS[origin or expected]}, given was {shown(value)}")


def _as_float(key: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        raise RecipeError(f"{key} takes a finite number, given was one of {len(str(value))} digits") from None
