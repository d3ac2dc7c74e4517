"""Which DeepSpeed configurations a run takes: names and types by DeepSpeed's own models, and what is refused.

DeepSpeed itself ignores a key that it does not know at the top level, and many below it, so a mistyped key is another
run than its user thinks. What is not listed here is refused by name.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling import constants as profiling
from deepspeed.runtime.activation_checkpointing import config as activation_checkpointing
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor import aio_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from ..common.errors import RecipeError, nearest_names, shown
from ..rules.global_batch import BatchPlan

AUTO = "auto"
WHAT = "the DeepSpeed configuration"
NO_MASTERS_KEYS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""With both in section bf16, DeepSpeed keeps no fp32 masters of bf16 weights; the second says nothing of the state of
an optimizer that is not its own."""
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

Kind = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(*names: str) -> Kind:
    return " or ".join(f'"{name}"' for name in names), lambda value: value in names


def _is_tag_validation(value: Any) -> bool:
    return isinstance(value, str) and value.upper() in ("IGNORE", "WARN", "FAIL")


_FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
_COUNT: Kind = ("a whole number above 0", lambda value: _is_number(value) and value == int(value) and value > 0)
_POSITIVE: Kind = ("a finite number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE: Kind = ("a finite number, 0 or more", lambda value: _is_number(value) and value >= 0)
_NUMBER: Kind = ("a finite number", _is_number)
_DTYPE = _one_of("fp32", "bf16", "fp16")

VALUES: dict[str, Kind] = {
    **dict.fromkeys(BATCH_KEYS, _COUNT),
    "gradient_clipping": _NOT_NEGATIVE,
    "communication_data_type": _DTYPE,
    "prescale_gradients": _FLAG,
    "gradient_predivide_factor": _POSITIVE,
    "gradient_allreduce_op": _one_of("mean"),
    "disable_allgather": _FLAG,
    "zero_allow_untested_optimizer": _FLAG,
    "zero_force_ds_cpu_optimizer": ("false: it would put DeepSpeed's CPU Adam in place", lambda value: value is False),
    "steps_per_print": _COUNT,
    "wall_clock_breakdown": _FLAG,
    "memory_breakdown": _FLAG,
    "dump_state": _FLAG,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "disable_python_gc": _FLAG,
}
"""Keys with a single value, and which it may be; "auto" leaves each to the recipe or to DeepSpeed's default."""

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}
"""Sections that DeepSpeed has a model of."""


def _like(default: Any) -> Kind:
    """Return what a key takes whose default this is."""
    if isinstance(default, bool):
        return _FLAG
    return (
        _NUMBER if isinstance(default, int | float) else ("text or null", lambda value: isinstance(value, str | None))
    )


_FLOPS = {
    value: getattr(profiling, f"{name}_DEFAULT")
    for name, value in vars(profiling).items()
    if name.startswith("FLOPS_PROFILER_") and hasattr(profiling, f"{name}_DEFAULT")
}

SECTIONS: dict[str, dict[str, Kind]] = {
    "data_types": {"grad_accum_dtype": (f'{_DTYPE[0]}, or "auto"', lambda v: v in (None, AUTO) or _DTYPE[1](v))},
    "aio": {key: _like(default) for key, default in aio_config.AIO_DEFAULT_DICT.items()},
    "activation_checkpointing": {
        **dict.fromkeys(activation_checkpointing.ACT_CHKPT_DEFAULT, _FLAG),
        activation_checkpointing.ACT_CHKPT_NUMBER_CHECKPOINTS: (
            "a whole number above 0, or null",
            lambda value: value is None or _COUNT[1](value),
        ),
    },
    "flops_profiler": {key: _like(default) for key, default in _FLOPS.items()},
    "checkpoint": {"tag_validation": ('"Ignore", "Warn" or "Fail"', _is_tag_validation)},
}
"""Sections that DeepSpeed reads key by key."""

_DATA_PARALLEL = "all ranks are data-parallel here"
_WHOLE_MODEL = "the model is trained as it is"

REFUSED: dict[str, str] = {
    "amp": "use --precision bf16",
    "torch_autocast": "use --precision bf16",
    "bfloat16": "its name is bf16",
    "sparse_gradients": "gradients are reduced dense",
    "tensor_parallel": f"{_DATA_PARALLEL}, and would read different data inside a tensor-parallel group",
    "expert_parallel": "BERT has no experts",
    "sequence_parallel_size": _DATA_PARALLEL,
    "seq_parallel_communication_data_type": _DATA_PARALLEL,
    "pipeline": _DATA_PARALLEL,
    "use_data_before_expert_parallelism": "BERT has no experts",
    "elasticity": "--global_batch is fixed, and --resume continues with any number of ranks that divides it",
    "curriculum_learning": "for growing sequences there are two phases, phase_two.sequence_length",
    "data_efficiency": "the recipe orders its data itself",
    "dataloader_drop_last": "the recipe orders its data itself",
    "progressive_layer_drop": _WHOLE_MODEL,
    "compression_training": _WHOLE_MODEL,
    "quantize_training": _WHOLE_MODEL,
    "weight_quantization": _WHOLE_MODEL,
    "eigenvalue": _WHOLE_MODEL,
    "sparse_attention": "attention is torch's SDPA",
    "timers": "the recipe turns DeepSpeed's throughput timer off, which would wait for the device",
    "autotuning": "`trustratio plan` finds the micro-batch that fits",
    "compile": "use training.compile=true",
    "graph_harvesting": "use training.compile=true",
    "hybrid_engine": "it belongs to reinforcement learning",
    "nebula": "checkpoints go into the run's folder",
    "datastates": "checkpoints go into the run's folder",
    "managed_gradient_accumulation": "the recipe itself says where an update ends",
    "vocabulary_size": "use data.vocabulary",
}
"""Keys of DeepSpeed that a run cannot take, and why or what to do instead."""

OWN_SECTIONS = {
    "optimizer": "choose with --optimizer NAME, --lr and optimizer.OPTION=VALUE",
    "scheduler": "use schedule.warmup, schedule.degree and schedule.final",
}
"""What would replace the recipe's own, and what to do instead."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check a user's DeepSpeed configuration, before it is completed.

    Args:
        settings: the file's content; "auto" stands for what the recipe or DeepSpeed choose.

    Raises:
        RecipeError: an unknown key (the nearest is named), a wrong type or value, or what the recipe cannot do.
    """
    _refuse_other_optimizers(settings)
    known = {**VALUES, **MODELS, **SECTIONS}
    for key, value in settings.items():
        if key in OWN_SECTIONS:
            raise RecipeError(f"{WHAT} sets its own `{key}`; remove that section and {OWN_SECTIONS[key]}")
        if key in REFUSED:
            raise RecipeError(f"{WHAT} sets `{key}`, which the recipe does not take: remove it; {REFUSED[key]}")
        if key not in known:
            raise _unknown(key, known)
        if key in VALUES:
            if value is not None and value != AUTO:
                _check_value(key, value, VALUES[key])
        elif key in MODELS:
            _check_model(key, value, MODELS[key])
        else:
            _check_keys(key, value, SECTIONS[key])
    _refuse_without_effect(settings)


def check_complete(settings: Mapping[str, Any], plan: BatchPlan) -> None:
    """Have DeepSpeed itself read a completed configuration, as it will be read when the model is wrapped.

    Raises:
        RecipeError: DeepSpeed refuses it; the message has DeepSpeed's reason.
    """
    # Before there is a process group, DeepSpeed reads the configuration as that of one rank.
    ranks = deepspeed.comm.get_world_size() if deepspeed.comm.is_initialized() else 1
    sizes = (plan.micro * plan.accumulation * ranks, plan.micro, plan.accumulation)
    try:
        DeepSpeedConfig({**settings, **dict(zip(BATCH_KEYS, sizes, strict=True))})
    except Exception as error:  # of any class, depending on what DeepSpeed first does with a value
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"DeepSpeed refuses {WHAT}: {reason}") from error


def _check_value(path: str, value: Any, kind: Kind) -> None:
    allowed, fits = kind
    if not fits(value):
        raise RecipeError(f"{WHAT} has {path}={shown(value)}: allowed is {allowed}")


def _check_keys(name: str, values: Any, known: Mapping[str, Kind]) -> None:
    for key, value in _object(name, values).items():
        if key not in known:
            raise _unknown(f"{name}.{key}", [f"{name}.{other}" for other in known])
        _check_value(f"{name}.{key}", value, known[key])


def _check_model(name: str, values: Any, model: type[BaseModel]) -> None:
    present = {key: value for key, value in _object(name, values).items() if value != AUTO}
    _check_finite(name, present)
    try:
        parsed = model(**present)
    except ValidationError as error:
        raise _of_validation(name, error, model) from error
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f"{WHAT} has a {name} that DeepSpeed refuses: {error}") from error
    _check_flags(name, present, parsed)


def _check_finite(path: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_finite(f"{path}.{key}", value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{WHAT} has {path}.{key}={value}: allowed are finite numbers")


def _check_flags(path: str, values: Mapping[str, Any], parsed: BaseModel) -> None:
    """Refuse "yes", 1 and the like for true, and true for a number, which pydantic takes and the recipe does not."""
    names = {info.alias or name: name for name, info in type(parsed).model_fields.items()}
    for key, value in values.items():
        read = getattr(parsed, names.get(key, key), None)
        if isinstance(value, Mapping) and isinstance(read, BaseModel):
            _check_flags(f"{path}.{key}", value, read)
        elif isinstance(read, bool) and not isinstance(value, bool):
            raise RecipeError(f"{WHAT} has {path}.{key}={shown(value)}: allowed is true or false")
        elif isinstance(read, int | float) and not isinstance(read, bool) and isinstance(value, bool | str):
            raise RecipeError(f"{WHAT} has {path}.{key}={shown(value)}: allowed is a number")


def _of_validation(name: str, error: ValidationError, model: type[BaseModel]) -> RecipeError:
    """Make the error for the first thing that pydantic found, with the path to it."""
    first = error.errors()[0]
    if not first["loc"]:
        return RecipeError(f"{WHAT} has a {name} that DeepSpeed refuses: {first['msg']}")
    *place, last = [name, *(str(step) for step in first["loc"])]
    if first["type"] == "extra_forbidden":
        known = _field_names(_model_at(model, place[1:]))
        return _unknown(".".join([*place, last]), [".".join([*place, field]) for field in known])
    return RecipeError(f"{WHAT} has {'.'.join([*place, last])}={shown(first.get('input'))}: {first['msg']}")


def _model_at(model: type[BaseModel] | None, place: list[str]) -> type[BaseModel] | None:
    """Return the model of the section inside `model` that the path leads to."""
    for step in place:
        if model is None or step not in model.model_fields:
            return None
        inner = model.model_fields[step].annotation
        kinds = [kind for kind in (inner, *get_args(inner)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        model = kinds[0] if kinds else None
    return model


def _field_names(model: type[BaseModel] | None) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()] if model is not None else []


def _unknown(path: str, known: Iterable[str]) -> RecipeError:
    return RecipeError(f"{WHAT} has an unknown key {path!r}; nearest: {', '.join(nearest_names(path, known))}")


def _object(name: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{WHAT} has {name}={shown(values)}: allowed is an object {{...}} of settings")
    return values


def _refuse_other_optimizers(settings: Mapping[str, Any]) -> None:
    """Refuse settings inside accepted sections that would step another optimizer."""
    zero = section(settings, "zero_optimization")
    offload = section(zero, "offload_optimizer")
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


def _refuse_without_effect(settings: Mapping[str, Any]) -> None:
    """Refuse settings inside accepted sections that the recipe cannot follow."""
    zero = section(settings, "zero_optimization")
    for key, instead in (
        ("cpu_offload", 'write "offload_optimizer": {"device": "cpu"}'),
        ("cpu_offload_param", 'write "offload_param": {"device": "cpu"}'),
        ("elastic_checkpoint", "a run continues on other numbers of ranks without it"),
        ("legacy_stage1", "this DeepSpeed has one stage 1 only"),
        ("stage3_module_granularity_threshold", "DeepSpeed 0.19 fails in backward() where all of BERT is below it"),
    ):
        if zero.get(key):
            raise RecipeError(f"zero_optimization.{key} is not supported: remove it; {instead}")
    for name, instead in (("wandb", "run.loggers=[wandb]"), ("comet", "metrics.jsonl, or run.loggers=[wandb]")):
        if section(settings, name).get("enabled") is True:  # where it fails on the first rank, the others would wait
            raise RecipeError(f"{name}.enabled is not supported: remove it, and use {instead}")
    if section(settings, "tensorboard").get("enabled") is True and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError("tensorboard.enabled needs the package tensorboard: pip install tensorboard, or remove it")
    if zero.get("compute_grad_norm") is False:
        raise RecipeError("zero_optimization.compute_grad_norm=false is not supported: the norm is logged; remove it")
    if section(settings, "fp16").get("fp16_master_weights_and_grads"):
        raise RecipeError(
            "fp16.fp16_master_weights_and_grads is not supported: it needs DeepSpeed's CPU Adam; remove it"
        )
    for key in NO_MASTERS_KEYS:
        if section(settings, "bf16").get(key):
            raise RecipeError(f"bf16.{key} is not supported: remove it; training.master=stochastic keeps no masters")
    if all(section(settings, name).get("enabled") is True for name in ("bf16", "fp16")):
        raise RecipeError(f"{WHAT} enables both bf16 and fp16; choose one")
    switched_on = [key for key, value in section(settings, "activation_checkpointing").items() if value]
    if switched_on:
        raise RecipeError(
            f"activation_checkpointing.{switched_on[0]} has no effect here: remove the section and use "
            "training.activation_checkpointing=true"
        )


def check_device(settings: Mapping[str, Any], ranks: int) -> None:
    """Refuse settings that this device, or this number of ranks, cannot do.

    Raises:
        RecipeError: names the setting and what to do.
    """
    accelerator, zero = get_accelerator(), section(settings, "zero_optimization")
    on_cpu = accelerator.device_name() == "cpu"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key) and on_cpu:
            raise RecipeError(f"zero_optimization.{key} needs a GPU (ZeRO++ has no CPU kernels); remove it")
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and ranks % size:
        raise RecipeError(f"zero_optimization.zero_hpz_partition_size={size} does not divide {ranks} ranks")
    if section(settings, "aio").get("use_gds") and on_cpu:
        raise RecipeError("aio.use_gds needs a GPU (GPUDirect Storage); remove it")
    for precision, supported in (("fp16", accelerator.is_fp16_supported), ("bf16", accelerator.is_bf16_supported)):
        if section(settings, precision).get("enabled") is True and not supported():
            raise RecipeError(
                f"{precision}.enabled: DeepSpeed has no {precision} on this {accelerator.device_name()}; remove it and "
                "use --precision fp32 or another device"
            )
    for key in ("offload_optimizer", "offload_param"):
        if section(zero, key).get("device") == "nvme" and not deepspeed.ops.__compatible_ops__.get("async_io"):
            raise RecipeError(
                f'zero_optimization.{key}.device="nvme" needs DeepSpeed\'s async_io, which cannot be built here '
                '(libaio is missing); use "cpu"'
            )


def section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of the settings, {} if there is none."""
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}
