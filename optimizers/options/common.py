"""The options that all optimizers have: their names, types and defaults are here and nowhere else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import TypedDict

from ..formulas.hyperparameters import check_choice, check_flag, check_segments
from ..formulas.rounding import MASTERS

__all__ = [
    "COMMON_DEFAULTS",
    "OF_THE_WHOLE",
    "STATE_DTYPES",
    "STORAGE_OPTIONS",
    "CommonOptions",
    "check_common",
    "check_storage",
    "fill_in",
    "floats_of",
    "options_of",
    "signature_of",
]


class CommonOptions(TypedDict, total=False):
    """What every constructor takes as ``**common``; each but ``implementation`` is also a group option.

    Attributes:
        adapt: Which layers the trust ratio scales: all (True), none (False), or those of two or more dimensions (None).
            It never depends on weight decay, and says nothing where an algorithm has no ratio.
        segments: Into how many equal parts along dimension 0 a layer is cut, each with a ratio of its own: a number,
            or numbers by parameter name or pattern.
        maximize: Ascend: the gradient counts with the other sign. Costs a copy of the gradient in a step.
        state_dtype: In what element-wise state is kept: "float32", or "bfloat16" with stochastic rounding that is the
            same under every sharding; None for fp32, and fp64 of fp64 parameters. docs/sixteen_bits.md has all three.
        master: How bf16 weights that nobody keeps in fp32 are rounded: "stochastic", "kahan" with what is lost in a
            second bf16 number, or to nearest (None), which loses small updates.
        rounding_seed: A whole number ≥ 0 of which chance follows.
        implementation: "eager", "cpu" or "triton"; None chooses by device. See `LayerwiseOptimizer.implementation`.
        foreach: As torch.optim's, for programs that pass it: None, True or False. Which code computes the step is for
            ``implementation`` to say, and the numbers are the same.
        fused: Likewise.
        capturable: Likewise, True or False: every step can be captured in a CUDA graph after the first one.
        differentiable: False; True is refused, since a step works in place, outside of autograd.
    """

    adapt: bool | None
    segments: int | Mapping[str, int] | None
    maximize: bool
    state_dtype: str | torch.dtype | None
    master: str | None
    rounding_seed: int
    implementation: str | None
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


COMMON_DEFAULTS: CommonOptions = {
    "adapt": None,
    "segments": None,
    "maximize": False,
    "state_dtype": None,
    "master": None,
    "rounding_seed": 0,
    "implementation": None,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}

NOT_OPTIONS = ("params", "defaults")
"""What constructors take besides options."""

OF_THE_WHOLE = ("implementation",)
"""Options of the whole optimizer, which no group has."""

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

STORAGE_OPTIONS = ("state_dtype", "master", "rounding_seed")
"""Options that say how a run keeps its numbers, so that it keeps them so whatever it loads."""


def fill_in(group: dict[str, Any]) -> None:
    """Give a group the common options that it lacks, as one of an older file or of a wrapper does."""
    for name, default in COMMON_DEFAULTS.items():
        if name not in OF_THE_WHOLE:
            group.setdefault(name, default)


def check_common(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group's value of an option that all optimizers have cannot be."""
    check_choice("adapt", group["adapt"], (None, True, False))
    check_segments(group["segments"], group.get("param_names"))
    for name in ("maximize", "capturable", "differentiable"):
        check_flag(name, group[name])
    for name in ("foreach", "fused"):
        check_choice(name, group[name], (None, True, False))
    if group["differentiable"]:
        raise ValueError(
            "differentiable must be False, got True: a step changes weights and state in place and outside of "
            "autograd, so no gradient can flow through it"
        )


def check_storage(group: dict[str, Any]) -> None:
    """Raise ValueError if a group's value of `STORAGE_OPTIONS` cannot be; a dtype becomes its name."""
    dtype = group["state_dtype"]
    group["state_dtype"] = next((name for name, known in STATE_DTYPES.items() if known is dtype), dtype)
    check_choice("state_dtype", group["state_dtype"], (None, *STATE_DTYPES))
    check_choice("master", group["master"], (None, *MASTERS))
    seed = group["rounding_seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"rounding_seed must be a whole number of at least 0, got {seed!r}")


def signature_of(optimizer_class: type) -> inspect.Signature:
    """The constructor's signature with the options that ``**common`` stands for, for whoever reads signatures.

    They are in it by name where the constructor has a ``**common: Unpack[CommonOptions]``.
    """
    signature = inspect.signature(optimizer_class.__init__)  # type: ignore[misc]
    _, *parameters = signature.parameters.values()
    if parameters and CommonOptions.__name__ in str(parameters[-1].annotation):
        named = {parameter.name for parameter in parameters}
        parameters[-1:] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=COMMON_DEFAULTS[name])  # type: ignore[literal-required]
            for name in COMMON_DEFAULTS
            if name not in named
        ]
    return signature.replace(parameters=parameters)


def options_of(optimizer_class: type) -> Mapping[str, Any]:
    """The constructor's options and their defaults; `inspect.Parameter.empty` where there is none."""
    return {name: parameter.default for name, parameter in _parameters(optimizer_class).items()}


def floats_of(optimizer_class: type) -> frozenset[str]:
    """The constructor's options that are real numbers, or several of them, as annotations and defaults say."""
    key: Any = optimizer_class
    return _floats_of(key)


@functools.cache
def _floats_of(optimizer_class: type) -> frozenset[str]:
    return frozenset(
        name
        for name, parameter in _parameters(optimizer_class).items()
        if "float" in str(parameter.annotation) or isinstance(parameter.default, float)
    )


def _parameters(optimizer_class: type) -> dict[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(optimizer_class).parameters
    except (TypeError, ValueError):  # a class that says something else of itself
        return {}
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {name: p for name, p in parameters.items() if name not in NOT_OPTIONS and p.kind not in variadic}
