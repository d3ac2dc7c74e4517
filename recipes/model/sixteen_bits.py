"""Optimizer state and weights with 16 bits: what a configuration asks for, in the optimizer's words and in a line."""

from __future__ import annotations

from typing import Any

from ..common.errors import RecipeError
from ..configuration.config import RecipeConfig, TrainingConfig

_COUNTERPARTS = {
    "adamw": "--optimizer lamb optimizer.adapt=false is AdamW",
    "sgd": "--optimizer lars optimizer.adapt=false optimizer.momentum_form=gradient is SGD with momentum",
}
"""What does of trustratio's optimizers what one of torch's does."""

_ROUNDED = {
    "stochastic": "rounded stochastically",
    "kahan": "with what rounding leaves in a second bf16 number",
    "none": "rounded to nearest, which loses small updates",
}


def storage_options(config: RecipeConfig) -> dict[str, Any]:
    """Return the options by which the optimizer keeps state and weights as `training` says; {} if it says nothing.

    Random bits follow the run's seed, unless `optimizer.rounding_seed` is another.

    Raises:
        RecipeError: the optimizer, one of its options or the precision contradicts.
    """
    training = config.training
    _refuse_elsewhere(config)
    if training.state_dtype is None and training.master is None:
        return {}
    _check_optimizer(config)
    _check_precision(training)
    options: dict[str, Any] = {"rounding_seed": config.optimizer.options.get("rounding_seed", training.seed)}
    if training.state_dtype is not None:
        options["state_dtype"] = training.state_dtype
    if training.master in ("stochastic", "kahan"):
        options["master"] = training.master
    return options


def state_bytes(training: TrainingConfig) -> int:
    """Return the bytes of a number of the optimizer's element-wise state."""
    return 2 if training.state_dtype == "bfloat16" else 4


def describe_storage(training: TrainingConfig, wrapped_by_deepspeed: bool) -> str:
    """Return the line that says how weights and optimizer state are kept.

    Args:
        training: with the precision settled.
        wrapped_by_deepspeed: which keeps fp32 masters of 16-bit weights.
    """
    state = "bf16, rounded stochastically" if training.state_dtype == "bfloat16" else "fp32"
    return f"weights in {_weights(training, wrapped_by_deepspeed)}; optimizer state in {state}"


def describe_conversion(saved: str | None, now: str | None) -> list[str]:
    """Return the line that says so if a checkpoint's optimizer state is kept in another dtype from now on.

    Args:
        saved: `training.state_dtype` of the run that wrote the checkpoint.
        now: that of the run that continues it.
    """
    before, after = saved or "float32", now or "float32"
    if before == after:
        return []
    how = "rounded to nearest once" if after == "bfloat16" else "which changes no number"
    return [f"the checkpoint's optimizer state is {before} and becomes {after}, {how}"]


def _weights(training: TrainingConfig, wrapped_by_deepspeed: bool) -> str:
    if training.master is not None:
        return f"bf16 without fp32 masters, {_ROUNDED[training.master]}"
    if training.precision == "fp32":
        return "fp32"
    if wrapped_by_deepspeed:
        return f"{training.precision} with fp32 masters"
    return f"fp32, computed with in {training.precision}"


def _refuse_elsewhere(config: RecipeConfig) -> None:
    """Both options have one place: the wrapper, the plan and checkpoints follow them, too."""
    for name in ("state_dtype", "master"):
        if name in config.optimizer.options:
            raise RecipeError(f"optimizer.{name} is not the optimizer's alone: give it as training.{name}")


def _check_optimizer(config: RecipeConfig) -> None:
    name = config.optimizer.name
    if name.lower() in _COUNTERPARTS:
        raise RecipeError(
            f"only trustratio's optimizers take {_given(config.training)}, and {name!r} is torch's: "
            f"{_COUNTERPARTS[name.lower()]}"
        )


def _check_precision(training: TrainingConfig) -> None:
    if training.master is not None and training.precision not in ("auto", "bf16"):
        raise RecipeError(
            f"training.master={training.master} keeps the weights in bf16, and training.precision="
            f"{training.precision} has others: use --precision bf16, or leave training.master out"
        )


def _given(training: TrainingConfig) -> str:
    """Return the options as they would be typed."""
    values = {"state_dtype": training.state_dtype, "master": training.master}
    return " and ".join(f"training.{name}={value}" for name, value in values.items() if value is not None)
