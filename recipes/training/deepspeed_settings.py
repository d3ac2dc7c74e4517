"""The DeepSpeed configuration of a run: the recipe's own, or a user's file checked against the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from ..rules.global_batch import BatchPlan

AUTO = "auto"
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_QUIET = 10**9  # steps between DeepSpeed's own progress lines; the recipe prints its own


def load_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        RecipeError: missing, unreadable, or no JSON object.
    """
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"--deepspeed_config {path!r} does not exist") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"--deepspeed_config {path!r} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"--deepspeed_config {path!r}: expected a JSON object, found {type(values).__name__}")
    return values


def refuse_unsupported(settings: Mapping[str, Any]) -> None:
    """Refuse what would replace the recipe's optimizer or schedule, or step it in a way that no layout explains.

    Raises:
        RecipeError: names the key and what to do.
    """
    if settings.get("optimizer"):
        raise RecipeError(
            "the DeepSpeed configuration sets its own `optimizer`; remove that section and choose with "
            "--optimizer NAME, --lr and optimizer.OPTION=VALUE"
        )
    if settings.get("scheduler"):
        raise RecipeError(
            "the DeepSpeed configuration sets its own `scheduler`; remove that section and use schedule.warmup, "
            "schedule.degree and schedule.final"
        )
    zero = _section(settings, "zero_optimization")
    offload = _section(zero, "offload_optimizer")
    if zero.get("zenflow"):
        raise RecipeError("zero_optimization.zenflow is not supported: ZenFlow steps optimizers of its own; remove it")
    if offload.get("super_offload"):
        raise RecipeError(
            "offload_optimizer.super_offload is not supported: it steps a CPU Adam of its own; remove it (plain "
            "offload_optimizer works)"
        )
    if offload.get("ratio", 1.0) != 1.0:
        raise RecipeError(
            f"partial offload (offload_optimizer.ratio={offload['ratio']}) is not supported: it needs DeepSpeed's CPU "
            "Adam; set ratio to 1.0 or remove it"
        )


def merge(
    settings: Mapping[str, Any],
    plan: BatchPlan,
    zero_stage: int,
    precision: str,
    gradient_clipping: float,
    elementwise: bool,
) -> dict[str, Any]:
    """Complete a configuration with the recipe's batch sizes, ZeRO stage, precision and clipping.

    A key of `settings` that the recipe also decides must agree with it or be "auto".

    Args:
        settings: the user's file, or {}.
        plan: batch sizes.
        zero_stage: 0 to 3; see `stage_of` for one that the file sets.
        precision: "fp32" or "bf16", or "fp16" if the file enables it.
        gradient_clipping: global-norm limit, 0 for none.
        elementwise: the optimizer is element-wise and DeepSpeed may not know it (SGD): exact under any sharding.

    Raises:
        RecipeError: contradictions, with both values.
    """
    refuse_unsupported(settings)
    merged = json.loads(json.dumps(settings))
    for key, value in zip(_BATCH_KEYS, (plan.sequences, plan.micro, plan.accumulation), strict=True):
        if merged.get(key, AUTO) not in (AUTO, value):
            raise RecipeError(
                f"the DeepSpeed configuration has {key}={merged[key]}, the recipe {value} "
                f"({plan.micro} x {plan.accumulation} x {plan.ranks} = {plan.sequences} sequences); remove the key, "
                f'set it to "auto", or change --global_batch or --micro_batch'
            )
        merged[key] = value
    zero = merged.setdefault("zero_optimization", {})
    zero["stage"] = zero_stage
    if _section(zero, "offload_optimizer").get("device", "none") not in ("none", None):
        # DeepSpeed otherwise insists on its CPU Adam in place of the optimizer it was given.
        merged["zero_force_ds_cpu_optimizer"] = False
    if elementwise:
        merged["zero_allow_untested_optimizer"] = True
    if merged.get("gradient_clipping", AUTO) == AUTO:
        merged["gradient_clipping"] = gradient_clipping  # explicit: DeepSpeed's default has changed between versions
    if precision == "bf16":
        merged.setdefault("bf16", {})["enabled"] = True
        if zero_stage == 1 and not _section(zero, "offload_optimizer"):
            # A global batch is many micro-batches: their bf16 gradients are summed in fp32.
            merged.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    merged.setdefault("steps_per_print", _QUIET)
    return merged


def without_batch_sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that stay the same when a run is continued with another micro-batch."""
    return {key: value for key, value in settings.items() if key not in _BATCH_KEYS}


def stage_of(settings: Mapping[str, Any]) -> int | None:
    """Return the ZeRO stage that a configuration file sets; None if it leaves it to the recipe."""
    stage = _section(settings, "zero_optimization").get("stage", AUTO)
    return None if stage == AUTO else int(stage)


def precision_of(settings: Mapping[str, Any]) -> str | None:
    """Return "fp16" or "bf16" if a configuration file enables it, "fp32" if it disables both, else None."""
    state = {name: _section(settings, name).get("enabled", AUTO) for name in ("fp16", "bf16")}
    for name, enabled in state.items():
        if enabled is True:
            return name
    return "fp32" if state["bf16"] is False else None


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}
