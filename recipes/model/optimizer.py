"""Optimizers by name for the recipes: trustratio's own, and torch's AdamW and SGD as baselines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from trustratio.optimizers import CurvatureAdamW, CurvatureSGD
from trustratio.optimizers.registry import OPTIMIZERS, create_optimizer

from ..common.errors import RecipeError, cut, shown, unknown_name
from ..configuration.config import OptimizerConfig

_Constructor = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Baseline:
    """One of torch's optimizers.

    Attributes:
        optimizer_class: the class.
        starting_rate: as in trustratio's registry.
    """

    optimizer_class: _Constructor
    starting_rate: float


BASELINES = {"adamw": Baseline(torch.optim.AdamW, 0.002), "sgd": Baseline(torch.optim.SGD, 0.5)}


def optimizer_names() -> list[str]:
    """Return every name that `build_optimizer` knows."""
    return sorted({*OPTIMIZERS, *BASELINES})


def is_baseline(name: str) -> bool:
    """Tell whether the name is one of torch's element-wise optimizers, which have no trust ratio."""
    return name.lower() in BASELINES


def sample_interval(config: OptimizerConfig) -> float | None:
    """Return every how many updates the optimizer wants a sample of the curvature, a second pass; None: never."""
    entry = OPTIMIZERS.get(config.name.lower())
    if entry is None or not issubclass(entry.optimizer_class, CurvatureSGD | CurvatureAdamW):
        return None
    interval: float | None = config.options.get("interval", entry.defaults["interval"])
    return interval


def starting_rates() -> dict[str, float]:
    """Return the learning rate to try first of every optimizer, for models of the tiny presets' size: guesses."""
    rates = {name: entry.starting_rate for name, entry in OPTIMIZERS.items()}
    return rates | {name: baseline.starting_rate for name, baseline in BASELINES.items()}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of named parameters: matrices with weight decay, biases and norm weights without."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(name, p) for name, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, storage: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer over the model's parameters.

    Args:
        config: name and options.
        model: whose parameters it trains.
        storage: options that the rest of the configuration decides, see `storage_options`; none of torch's has them.

    Raises:
        RecipeError: unknown name (the nearest are given), or options that its constructor refuses.
    """
    name = config.name.lower()
    if name not in optimizer_names():
        raise unknown_name("optimizer", config.name, optimizer_names())
    groups = parameter_groups(model, config.weight_decay)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
    segments = options.get("segments")
    if isinstance(segments, Mapping) and name not in BASELINES:
        _share_segments(groups, segments)
        del options["segments"]
    try:
        if name in BASELINES:
            _require_kinds(BASELINES[name].optimizer_class, options)
            return BASELINES[name].optimizer_class(groups, lr=config.lr, **options)
        return create_optimizer(name, groups, lr=config.lr, **{**options, **(storage or {})})
    except (TypeError, ValueError) as error:
        given = shown(config.options, 300)
        raise RecipeError(
            f"optimizer {shown(config.name)} refused its options {given}: {cut(str(error), 500)}"
        ) from error


def _share_segments(groups: Sequence[dict[str, Any]], segments: Mapping[str, Any]) -> None:
    """Give each group the patterns that name layers of its own; the first also those that name none, to be refused."""
    shared: list[dict[str, Any]] = [{} for _ in groups]
    for pattern, count in segments.items():
        named = [any(fnmatchcase(name, pattern) for name, _ in group["params"]) for group in groups]
        for index, mine in enumerate(named if any(named) else [True]):
            shared[index] |= {pattern: count} if mine else {}
    for group, own in zip(groups, shared, strict=True):
        group["segments"] = own or 1


def _require_kinds(constructor: _Constructor, options: Mapping[str, Any]) -> None:
    """Check that options are of the kinds of their defaults: torch takes any text for True.

    Raises:
        ValueError: names the option, what it has to be and what was given.
    """
    parameters = inspect.signature(constructor).parameters
    for name in options.keys() & parameters.keys():
        value, default = options[name], parameters[name].default
        if default is None or isinstance(default, bool):
            allowed, right = "True or False", isinstance(value, bool) or value is default
        elif isinstance(default, tuple):
            allowed = f"{len(default)} numbers"
            right = isinstance(value, tuple) and len(value) == len(default) and all(map(_is_number, value))
        else:
            allowed, right = "a number", _is_number(value)
        if not right:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
