"""The "optimizer" section of DeepSpeed's settings: audited itself, or compared with the optimizer that is given."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .configurations import Configuration
from .errors import CannotAudit
from .subject import Subject

__all__ = ["chosen_subject"]

ADAMS = ("adam", "adamw")
KNOWN = "Adam, AdamW, Adagrad, Lamb and the classes of torch.optim"
LAMB = "deepspeed.ops.lamb.FusedLamb"


@dataclass(frozen=True)
class _Asked:
    """What a section asks for.

    Attributes:
        kind: As it is written.
        path: The class that DeepSpeed takes.
        params: Of that class.
        like: The class in torch that takes the same steps but for rounding, or the same one.
    """

    kind: str
    path: str
    params: dict[str, Any]
    like: str


def chosen_subject(
    make_optimizer: str | Callable[..., Any] | None,
    make_model: str | Callable[[], nn.Module] | None,
    options: dict[str, Any],
    configuration: Configuration,
) -> tuple[Subject, Configuration]:
    """Say what is audited: the optimizer that is given, or the section's if none is.

    Returns:
        It, and the configuration, which keeps the section only if DeepSpeed is to make the optimizer.

    Raises:
        CannotAudit: If there is none, two that differ, or a section of which it is not known what one process does.
    """
    section = configuration.options.get("optimizer") if configuration.wrapper == "deepspeed" else None
    if make_optimizer is not None:
        given = Subject(make_optimizer, make_model, options)
        return given, configuration if section is None else _without_section(given, section, configuration)
    if section is None:
        raise CannotAudit(
            'no optimizer is given, and the configuration has no "optimizer" section of DeepSpeed: name one, as in '
            "torch.optim.AdamW"
        )
    if options:
        raise CannotAudit('options belong to an optimizer that is given: write them into the "optimizer" section')
    asked = _read(section, configuration)
    note = f'the "optimizer" section is audited, as DeepSpeed makes it, beside {asked.path} in one process'
    subject = Subject(asked.path, make_model, asked.params, name=f"DeepSpeed's {asked.kind}")
    return subject, configuration.noting(note)


def _read(section: Any, configuration: Configuration) -> _Asked:
    kind = section.get("type") if isinstance(section, dict) else None
    params = (section.get("params") or {}) if isinstance(section, dict) else None
    if not isinstance(kind, str) or not isinstance(params, dict):
        raise CannotAudit('the "optimizer" section is written {"type": "AdamW", "params": {"lr": 0.001}}')
    if kind.lower() in ADAMS:
        return _adam(kind, dict(params), configuration.offloads_optimizer)
    if kind.lower() == "lamb":
        return _Asked(kind, LAMB, params, LAMB)
    name = kind.capitalize() if kind.lower() == "adagrad" else kind
    if kind.lower() == "muon" or not isinstance(getattr(torch.optim, name, None), type):
        raise CannotAudit(
            f'the "optimizer" section has the type {kind}, and the audit knows {KNOWN}: remove the section, and give '
            "the optimizer itself"
        )
    return _Asked(kind, f"torch.optim.{name}", params, f"torch.optim.{name}")


def _adam(kind: str, params: dict[str, Any], offloads: bool) -> _Asked:
    decoupled = bool(params.pop("adam_w_mode", True)) or kind.lower() == "adamw"
    like = f"torch.optim.{'AdamW' if decoupled else 'Adam'}"
    if params.pop("torch_adam", False):
        return _Asked(kind, like, params, like)
    if offloads:
        return _Asked(kind, "deepspeed.ops.adam.DeepSpeedCPUAdam", {**params, "adamw_mode": decoupled}, like)
    return _Asked(kind, "deepspeed.ops.adam.FusedAdam", {**params, "adam_w_mode": decoupled}, like)


def _without_section(given: Subject, section: Any, configuration: Configuration) -> Configuration:
    """The configuration without the section, if that says what the optimizer is."""
    if configuration.accelerate is not None:
        raise CannotAudit(
            'the DeepSpeed configuration has an "optimizer" section, which accelerate refuses beside an optimizer '
            "object: remove it, or name no optimizer, to audit the section's"
        )
    asked = _read(section, configuration)
    made = given.make_optimizer(given.make_model(1, None, 0)[0])
    if _like(made) != asked.like:
        raise CannotAudit(
            f'the DeepSpeed configuration has an "optimizer" section ({asked.kind}), and {given.title} is another: '
            "remove the section, or name no optimizer, to audit the section's"
        )
    options = {**_defaults(asked.path), **asked.params}
    differing = [
        f"{key} {options[key]} in the section, {value} in the optimizer given"
        for key, value in made.defaults.items()
        if key in options and _plain(value) != _plain(options[key])
    ]
    if differing:
        raise CannotAudit(
            f'the "optimizer" section and the optimizer differ: {"; ".join(differing)}. Write the same in both, or '
            "remove the section"
        )
    kept = {key: value for key, value in configuration.options.items() if key != "optimizer"}
    note = 'the "optimizer" section says the same as the optimizer given, which DeepSpeed takes'
    return replace(configuration, options=kept).noting(note)


def _like(made: torch.optim.Optimizer) -> str:
    """The class, of DeepSpeed's Adams the one in torch that takes the same steps."""
    kind = type(made)
    if kind.__module__.startswith("deepspeed.ops.adam"):
        return f"torch.optim.{'AdamW' if getattr(made, 'adam_w_mode', True) else 'Adam'}"
    if kind.__module__.startswith("deepspeed.ops.lamb"):
        return LAMB
    return f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim") else ""


def _defaults(path: str) -> dict[str, Any]:
    """The arguments' defaults: DeepSpeed's weight decay is not torch's."""
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
