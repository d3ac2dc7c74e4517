"""What the YAML of `accelerate config` asks for. Every key is followed, named in a note, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .configurations import Configuration, configuration_of_mapping, read_json
from .errors import CannotAudit

__all__ = ["configuration_of_yaml"]

WITHOUT_SHARDING = ("MULTI_GPU", "MULTI_CPU", "NO")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FOLLOWED = ("distributed_type", "mixed_precision", "deepspeed_config", "fsdp_config")
SECTION_OF = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP"}
PARALLELISM = ("parallelism_config", "megatron_lm_config", "fp8_config")
OF_LAUNCHING = (
    "compute_environment",
    "debug",
    "enable_cpu_affinity",
    "gpu_ids",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "mpirun_config",
    "num_machines",
    "num_processes",
    "rdzv_backend",
    "same_network",
    "use_cpu",
    "tpu_name",
    "tpu_zone",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "tpu_vm",
    "tpu_env",
    "command_file",
    "commands",
    "downcast_bf16",
)
OF_THE_FORWARD = ("dynamo_config", "dynamo_backend")

DEEPSPEED_FOLLOWED = (
    "deepspeed_config_file",
    "zero_stage",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
)
DEEPSPEED_WITHOUT_INFLUENCE = (
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_hostfile",
    "deepspeed_multinode_launcher",
    "deepspeed_exclusion_filter",
    "deepspeed_inclusion_filter",
    "deepspeed_moe_layer_cls_names",
)
INSTEAD_OF_A_FILE = (*DEEPSPEED_FOLLOWED[1:], "zero3_save_16bit_model")
"""What accelerate refuses beside deepspeed_config_file."""

FSDP_FOLLOWED = ("version", "use_orig_params", "sharding_strategy", "reshard_after_forward")
FSDP_OTHERWISE = (
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
    "state_dict_type",
    "offload_params",
    "backward_prefetch",
    "forward_prefetch",
    "cpu_ram_efficient_loading",
    "sync_module_states",
    "activation_checkpointing",
    "activation_checkpointing_offload",
)
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
ON_ONE_MACHINE = {"HYBRID_SHARD": "FULL_SHARD", "HYBRID_SHARD_ZERO2": "SHARD_GRAD_OP"}


def configuration_of_yaml(content: dict[str, Any], path: Path) -> Configuration:
    """Read what `accelerate config` writes.

    Raises:
        CannotAudit: If it asks for another kind of training than DeepSpeed, FSDP and DDP, or has a key that is unknown.
    """
    kind = str(content.get("distributed_type", "missing"))
    if kind not in ("DEEPSPEED", "FSDP", *WITHOUT_SHARDING):
        raise CannotAudit(
            f"{path} has distributed_type {kind}: the audit covers DEEPSPEED, FSDP, MULTI_GPU and MULTI_CPU"
        )
    notes = _notes_of_the_file(content, kind, path)
    precision = str(content.get("mixed_precision") or "no")  # YAML reads a bare no as False
    if precision not in ("no", *PRECISIONS):
        raise CannotAudit(f"{path} has mixed_precision {precision}: the audit covers no, bf16 and fp16")
    if kind == "DEEPSPEED":
        configuration = _of_deepspeed(content, precision, path)
    elif kind == "FSDP":
        configuration = _of_fsdp(_section(content, "fsdp_config", path), precision, path)
    else:
        configuration = _of_ddp(kind, precision)
    return replace(configuration, title=f"accelerate {configuration.title}", notes=(*configuration.notes, *notes))


def _notes_of_the_file(content: dict[str, Any], kind: str, path: Path) -> list[str]:
    _refuse_unknown(content, (*FOLLOWED, *PARALLELISM, *OF_LAUNCHING, *OF_THE_FORWARD), str(path))
    for key in PARALLELISM:
        if content.get(key):
            raise CannotAudit(f"{path} has {key}: the audit covers data parallelism in fp32, bf16 and fp16. Remove it")
    notes = []
    launching = [f"{key} {content[key]}" for key in OF_LAUNCHING if key in content]
    if launching:
        notes.append(f"of no influence, as the audit starts its own ranks, on this machine: {', '.join(launching)}")
    unused = [key for key in OF_THE_FORWARD if content.get(key)]
    unused += [
        key
        for key, of in (("deepspeed_config", "DEEPSPEED"), ("fsdp_config", "FSDP"))
        if of != kind and content.get(key)
    ]
    if unused:
        notes.append(f"of no influence on the optimizer's steps under distributed_type {kind}: {', '.join(unused)}")
    return notes


def _refuse_unknown(section: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [str(key) for key in section if key not in known]
    if unknown:
        raise CannotAudit(f"{where} has {', '.join(unknown)}, of which it is not known what follows: remove it")


def _section(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    section = content.get(key) or {}
    if not isinstance(section, dict):
        raise CannotAudit(f"{key} in {path} must be a section of settings, not {section!r}")
    return section


def _whole_number(value: Any, key: str) -> int:
    """A number that YAML may have as text."""
    if not str(value).isdecimal():
        raise CannotAudit(f"{key} must be a whole number, not {value!r}")
    return int(value)


# DDP and FSDP -------------------------------------------------------------------------------------------------------


def _of_ddp(kind: str, precision: str) -> Configuration:
    notes = ["distributed_type NO is one process, which shards nothing: audited as DDP"] if kind == "NO" else []
    if precision != "no":
        notes.append(
            f"mixed_precision {precision} is autocast, which changes gradients alone, and these are injected: the "
            "optimizer steps the same fp32 weights"
        )
    return Configuration("ddp", "DDP", notes=tuple(notes))


def _of_fsdp(section: dict[str, Any], precision: str, path: Path) -> Configuration:
    given = {str(key).removeprefix("fsdp_"): value for key, value in section.items()}
    _refuse_unknown(given, (*FSDP_FOLLOWED, *FSDP_OTHERWISE), f"fsdp_config in {path}")
    version = _whole_number(given.get("version", 1), "fsdp_version")
    notes = ["sharded by torch's FSDP, the members of each ModuleList one by one"]
    options: dict[str, Any] = {"fsdp": version}
    if version == 1:
        options["use_orig_params"] = _truth(given.get("use_orig_params", True), "fsdp_use_orig_params")
        options["sharding_strategy"] = _strategy(given, notes)
    elif "reshard_after_forward" in given:
        options["reshard_after_forward"] = _truth(given["reshard_after_forward"], "fsdp_reshard_after_forward")
    of_fsdp1 = ("use_orig_params", "sharding_strategy") if version == 2 else ()
    unread = [f"{key} {given[key]}" for key in given if key in (*FSDP_OTHERWISE, *of_fsdp1)]
    if unread:
        notes.append(
            "not followed, as modules, devices and checkpoints are the audit's own choice, and the optimizer's steps "
            f"do not depend on the rest: {', '.join(unread)}"
        )
    if precision != "no":
        options.update(_precision(version, PRECISIONS[precision]))
    configuration = configuration_of_mapping(options)
    title = " ".join([configuration.title, *([precision] if precision != "no" else [])])
    return replace(configuration, title=title, notes=tuple(notes))


def _truth(value: Any, key: str) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise CannotAudit(f"{key} must be true or false, not {value!r}")
    return text == "true"


def _strategy(given: dict[str, Any], notes: list[str]) -> Any:
    from torch.distributed.fsdp import ShardingStrategy

    asked = given.get("sharding_strategy", given.get("reshard_after_forward", "FULL_SHARD"))
    text = str(asked).upper()
    if text.isdecimal() and 1 <= int(text) <= len(STRATEGIES):
        text = STRATEGIES[int(text) - 1]
    if text not in STRATEGIES:
        raise CannotAudit(f"fsdp_sharding_strategy must be one of {', '.join(STRATEGIES)}, not {asked!r}")
    if text in ON_ONE_MACHINE:
        notes.append(f"{text} is {ON_ONE_MACHINE[text]} within one machine, as the audit's is")
    return ShardingStrategy[ON_ONE_MACHINE.get(text, text)]


def _precision(version: int, dtype: torch.dtype) -> dict[str, Any]:
    """What accelerate gives the wrapper: fp32 shards, of which gradients are taken and reduced in 16 bits."""
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    if version == 1:
        return {"mixed_precision": MixedPrecision(param_dtype=dtype, reduce_dtype=dtype, buffer_dtype=dtype)}
    return {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)}


# DeepSpeed ----------------------------------------------------------------------------------------------------------


def _of_deepspeed(content: dict[str, Any], precision: str, path: Path) -> Configuration:
    section = _section(content, "deepspeed_config", path)
    _refuse_unknown(section, (*DEEPSPEED_FOLLOWED, *DEEPSPEED_WITHOUT_INFLUENCE), f"deepspeed_config in {path}")
    notes = [f"{key} has no influence" for key in DEEPSPEED_WITHOUT_INFLUENCE if key in section]
    file = section.get("deepspeed_config_file")
    if file is not None:
        both = [key for key in INSTEAD_OF_A_FILE if key in section]
        both += ["mixed_precision"] if "mixed_precision" in content else []
        if both:
            raise CannotAudit(
                f"{path} has {', '.join(both)} beside deepspeed_config_file, which accelerate refuses: write it into "
                f"{file} alone"
            )
        config = read_json(Path(file) if Path(file).is_absolute() else path.parent / file)
    else:
        config = _deepspeed_config(section, precision)
    sharded = configuration_of_mapping(config)
    return replace(sharded, accelerate=content, notes=(*sharded.notes, *notes))


def _deepspeed_config(section: dict[str, Any], precision: str) -> dict[str, Any]:
    """What accelerate's plugin makes of the section, as DeepSpeed's own settings."""
    zero: dict[str, Any] = {"stage": _whole_number(section.get("zero_stage", 2), "zero_stage")}
    for of in ("offload_optimizer", "offload_param"):
        device = str(section.get(f"{of}_device", "none"))
        if device != "none":
            zero[of] = {"device": device}
        if device == "nvme":
            zero[of]["nvme_path"] = section.get(f"{of}_nvme_path")
    accumulation = section.get("gradient_accumulation_steps", 1)
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "gradient_accumulation_steps": accumulation
        if accumulation == "auto"
        else _whole_number(accumulation, "gradient_accumulation_steps"),
    }
    clipping = section.get("gradient_clipping")
    if str(clipping).lower() != "none":
        config["gradient_clipping"] = clipping if clipping == "auto" else _number(clipping)
    if precision != "no":
        config[precision] = {"enabled": True}
    return config


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value  # refused with the other settings
