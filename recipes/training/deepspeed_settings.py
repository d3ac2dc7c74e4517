"""The DeepSpeed configuration of a run: the recipe's own, or a user's file checked against the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, kind_of
from ..rules.global_batch import BatchPlan
from .deepspeed_schema import (
    AUTO,
    BATCH_KEYS,
    NO_MASTERS_KEYS,
    VALUES,
    WHAT,
    check_complete,
    check_device,
    check_settings,
    section,
)

_NO_CLOCK = {"throughput": {"enabled": False}}  # it would wait for the device twice in every micro-batch
_QUIET = 10**9  # steps between DeepSpeed's own progress lines; the recipe prints its own


def load_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        RecipeError: missing, unreadable, or no JSON object; a key that is there twice.
    """
    try:
        values = json.loads(Path(path).read_text(), object_pairs_hook=_without_repetition)
    except FileNotFoundError as error:
        raise RecipeError(f"--deepspeed_config {path!r} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"--deepspeed_config {path!r} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"--deepspeed_config {path!r}: expected a JSON object, found {kind_of(values)}")
    return values


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is there twice")
    return dict(pairs)


def merge(
    settings: Mapping[str, Any],
    plan: BatchPlan,
    zero_stage: int,
    precision: str,
    gradient_clipping: float,
    elementwise: bool,
    saved: bool = False,
    master: str | None = None,
) -> dict[str, Any]:
    """Complete a configuration with the recipe's batch sizes, ZeRO stage, precision and clipping.

    A key of `settings` that the recipe also decides must agree with it or be "auto".

    Args:
        settings: the user's file, or {}.
        plan: batch sizes.
        zero_stage: 0 to 3; see `stage_of` for one that the file sets.
        precision: "fp32", "bf16" or "fp16".
        gradient_clipping: global-norm limit, 0 for none.
        elementwise: the optimizer is element-wise and DeepSpeed may not know it (SGD): exact under any sharding.
        saved: `settings` are those that a run was started with, which a resumed one keeps.
        master: of `TrainingConfig`: DeepSpeed keeps no fp32 copy of the weights unless it is None.

    Raises:
        RecipeError: contradictions, with both values; what `check_settings` or DeepSpeed refuse.
    """
    check_settings(settings)
    merged = {key: value for key, value in json.loads(json.dumps(settings)).items() if not _is_left_open(key, value)}
    for key, value in zip(BATCH_KEYS, (plan.sequences, plan.micro, plan.accumulation), strict=True):
        if merged.get(key, AUTO) not in (AUTO, value):
            raise RecipeError(
                f"the DeepSpeed configuration has {key}={merged[key]}, the recipe {value} "
                f"({plan.micro} x {plan.accumulation} x {plan.ranks} = {plan.sequences} sequences); remove the key, "
                f'set it to "auto", or change --global_batch or --micro_batch'
            )
        merged[key] = value
    zero = merged.setdefault("zero_optimization", {})
    zero["stage"] = zero_stage
    if section(zero, "offload_optimizer").get("device", "none") not in ("none", None):
        # DeepSpeed otherwise insists on its CPU Adam in place of the optimizer it was given.
        merged["zero_force_ds_cpu_optimizer"] = False
    if elementwise:
        merged["zero_allow_untested_optimizer"] = True
    if merged.get("gradient_clipping", AUTO) == AUTO:
        merged["gradient_clipping"] = gradient_clipping  # explicit: DeepSpeed's default has changed between versions
    if master is not None:
        _keep_no_masters(merged, zero_stage, master)
    elif precision != "fp32":
        merged.setdefault(precision, {})["enabled"] = True
    _choose_sums(merged, zero_stage, precision, saved, master)
    _check_offload(zero, zero_stage)
    _check_buckets(zero, zero_stage)
    _check_scaling(merged, zero_stage)
    _check_loss_scale(zero_stage, precision)
    merged.setdefault("steps_per_print", _QUIET)
    merged["timers"] = _NO_CLOCK
    check_device(merged, plan.ranks)
    check_complete(merged, plan)
    return merged


def _is_left_open(key: str, value: Any) -> bool:
    """Tell whether a key is left to the recipe or to DeepSpeed, which itself takes "auto" inside its models alone."""
    return key in VALUES and value in (None, AUTO)


def _keep_no_masters(merged: dict[str, Any], zero_stage: int, master: str) -> None:
    """Have DeepSpeed 0.19.8 give bf16 weights, or this rank's part of them, to the optimizer as they are.

    From stage 1 on that is a setting. At stage 0 it keeps fp32 masters of whatever it casts itself, and none of a model
    that is bf16 already.
    """
    for part in ("offload_optimizer", "offload_param"):
        if section(section(merged, "zero_optimization"), part).get("device", "none") not in ("none", None):
            raise RecipeError(
                f"training.master={master} and zero_optimization.{part} cannot go together: without fp32 masters "
                "DeepSpeed offloads to its own CPU Adam alone; leave one of them out"
            )
    if zero_stage == 0:
        if section(merged, "bf16").get("enabled") is True:
            raise RecipeError(
                f"{WHAT} enables bf16, of which DeepSpeed keeps fp32 masters at stage 0, and training.master={master} "
                "asks for none: remove bf16, which the model then is by itself, or use --zero_stage 1"
            )
        return
    merged.setdefault("bf16", {}).update({"enabled": True}, **dict.fromkeys(NO_MASTERS_KEYS, True))


def _choose_sums(
    merged: dict[str, Any], zero_stage: int, precision: str, saved: bool, master: str | None = None
) -> None:
    """Have the 16-bit gradients of an update's many micro-batches summed in fp32, where DeepSpeed can.

    DeepSpeed 0.19.8 can at every stage but 0, for bf16 and fp16, with and without offload; without fp32 masters from
    stage 2 on.
    """
    asked = section(merged, "data_types").get("grad_accum_dtype", AUTO)
    if master is not None and zero_stage < 2:
        if asked not in (AUTO, None) and (zero_stage == 0 or asked != "bf16"):
            raise RecipeError(
                f"{WHAT} has data_types.grad_accum_dtype={asked}, which DeepSpeed cannot do at stage {zero_stage} with "
                f"training.master={master}: remove it, or use --zero_stage 2"
            )
        if zero_stage == 0:
            merged.pop("data_types", None)
        else:  # else DeepSpeed's stage 1 takes another wrapper, which keeps fp32 masters whatever it is told
            merged.setdefault("data_types", {})["grad_accum_dtype"] = "bf16"
    elif asked not in (AUTO, None):
        if asked != precision and (zero_stage == 0 or asked != "fp32"):
            allowed = "remove it, or use --zero_stage 1" if zero_stage == 0 else "set it to fp32 or remove it"
            raise RecipeError(
                f"{WHAT} has data_types.grad_accum_dtype={asked}, which DeepSpeed cannot do with {precision} at stage "
                f"{zero_stage}: {allowed}"
            )
    elif precision != "fp32" and zero_stage and not saved:
        merged.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
    elif "data_types" in merged:
        del merged["data_types"]


def sums_dtype(settings: Mapping[str, Any] | None, precision: str, master: str | None = None) -> str:
    """Return what the gradients of an update's micro-batches are summed in: "fp32", "bf16" or "fp16".

    Args:
        settings: complete DeepSpeed settings; None without DeepSpeed, where gradients are what the weights are.
        precision: of training.
        master: of `TrainingConfig`: weights are fp32 without DeepSpeed if it is None, else bf16.
    """
    if settings is None:
        return "fp32" if master is None else "bf16"
    asked = section(settings, "data_types").get("grad_accum_dtype", AUTO)
    return precision if asked in (AUTO, None) else asked


def describe_sums(
    settings: Mapping[str, Any] | None,
    precision: str,
    zero_stage: int,
    accumulation: int,
    master: str | None = None,
) -> list[str]:
    """Return the lines that say so where an update's gradients are summed in less than fp32."""
    dtype = sums_dtype(settings, precision, master)
    if dtype == "fp32" or accumulation == 1:
        return []
    if settings is None:
        why = f"training.master={master} has gradients in bf16: DeepSpeed's --zero_stage 2 sums them in fp32"
    elif zero_stage < (1 if master is None else 2):
        why = f"DeepSpeed has no fp32 sums at stage {zero_stage}: --zero_stage {1 if master is None else 2} has"
        why += "" if master is None else f" with training.master={master}"
    else:
        why = 'as the DeepSpeed configuration says; data_types.grad_accum_dtype="fp32" sums in fp32'
    return [f"warning: the gradients of {accumulation} micro-batches are summed in {dtype} ({why})"]


def _check_offload(zero: Mapping[str, Any], zero_stage: int) -> None:
    """Refuse offload at a stage that would ignore it."""
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if section(zero, key).get("device", "none") not in ("none", None) and zero_stage not in stages:
            raise RecipeError(
                f"zero_optimization.{key} has no effect at stage {zero_stage}: remove it, or use --zero_stage "
                f"{stages[-1]}"
            )


def _check_buckets(zero: Mapping[str, Any], zero_stage: int) -> None:
    """Refuse what DeepSpeed's stages 1 and 2 assert when the engine is built, after the data were prepared."""
    size = zero.get("allgather_bucket_size", AUTO)
    if zero_stage in (1, 2) and size != AUTO and size % 2:
        raise RecipeError(
            f"{WHAT} has zero_optimization.allgather_bucket_size={size}: at stages 1 and 2 DeepSpeed takes even "
            "numbers of elements only"
        )


def _check_scaling(merged: Mapping[str, Any], zero_stage: int) -> None:
    """Refuse what DeepSpeed's reduce-scatter, the default of stages 2 and 3, cannot scale gradients by."""
    if zero_stage < 2 or section(merged, "zero_optimization").get("reduce_scatter", True) is False:
        return
    for key, usual in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if merged.get(key, usual) != usual:
            raise RecipeError(
                f"{WHAT} has {key}={merged[key]}, which DeepSpeed cannot do at stage {zero_stage} with "
                "zero_optimization.reduce_scatter: remove it, or set reduce_scatter to false"
            )


def _check_loss_scale(zero_stage: int, precision: str) -> None:
    """Refuse fp16 at stage 0: DeepSpeed 0.19.8 divides gradients by a loss scale that the loss never had there."""
    if zero_stage == 0 and precision == "fp16":
        raise RecipeError(
            "fp16 at stage 0 has gradients that are too small by the loss scale, since DeepSpeed divides by it and "
            "does not scale the loss: use --zero_stage 1, or --precision bf16"
        )


def without_batch_sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that stay the same when a run is continued with another micro-batch.

    Earlier releases' have no "timers", which decide nothing.
    """
    return {key: value for key, value in settings.items() if key not in (*BATCH_KEYS, "timers")}


def as_given(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's saved settings as a file may have them: without what the recipe decides anew."""
    given = without_batch_sizes(saved)
    if "bf16" in given:
        given["bf16"] = {key: value for key, value in given["bf16"].items() if key not in NO_MASTERS_KEYS}
    return given


def stage_of(settings: Mapping[str, Any]) -> int | None:
    """Return the ZeRO stage that a configuration file sets; None if it leaves it to the recipe."""
    stage = section(settings, "zero_optimization").get("stage", AUTO)
    return None if stage == AUTO else int(stage)


def precision_of(settings: Mapping[str, Any]) -> str | None:
    """Return "fp16" or "bf16" if a configuration file enables it, "fp32" if it disables both, else None."""
    state = {name: section(settings, name).get("enabled", AUTO) for name in ("fp16", "bf16")}
    for name, enabled in state.items():
        if enabled is True:
            return name
    return "fp32" if state["bf16"] is False else None
