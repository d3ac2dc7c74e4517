"""Configurations of accelerate: what its YAML asks for, and the DeepSpeed engine that it makes of that."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trustratio.optimizers.sharding.internals import Internals

from .configurations import Configuration, configuration_of_mapping, read_json
from .errors import CannotAudit

__all__ = ["configuration_of_yaml", "prepared_engine"]

INTERNALS = Internals("accelerate", "accelerate", "1.10.0 to 1.15.0")

WITHOUT_SHARDING = ("MULTI_GPU", "MULTI_CPU", "NO")


def configuration_of_yaml(content: dict[str, Any], path: Path) -> Configuration:
    """Read what `accelerate config` writes.

    Raises:
        CannotAudit: If it asks for another kind of training than DeepSpeed, FSDP and DDP.
    """
    kind = str(content.get("distributed_type", "NO"))
    if kind == "DEEPSPEED":
        return _of_deepspeed(content, path)
    if kind == "FSDP":
        return _of_fsdp(content)
    if kind in WITHOUT_SHARDING:
        return Configuration("ddp", "accelerate DDP")
    raise CannotAudit(f"{path} has distributed_type {kind}: the audit covers DEEPSPEED, FSDP, MULTI_GPU and MULTI_CPU")


def _of_deepspeed(content: dict[str, Any], path: Path) -> Configuration:
    section = dict(content.get("deepspeed_config") or {})
    config = _deepspeed_config(content, section, path)
    sharded = configuration_of_mapping(config)
    return replace(sharded, title=f"accelerate {sharded.title}", accelerate=content)


def _deepspeed_config(content: dict[str, Any], section: dict[str, Any], path: Path) -> dict[str, Any]:
    """What accelerate's plugin makes of the section, as DeepSpeed's own settings."""
    file = section.get("deepspeed_config_file")
    if file is not None:
        return read_json(Path(file) if Path(file).is_absolute() else path.parent / file)
    zero: dict[str, Any] = {"stage": int(section.get("zero_stage", 2))}
    for of, key in (("offload_optimizer", "offload_optimizer_device"), ("offload_param", "offload_param_device")):
        if str(section.get(key, "none")) != "none":
            zero[of] = {"device": str(section[key])}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "gradient_accumulation_steps": _number(section.get("gradient_accumulation_steps", 1)),
    }
    if str(section.get("gradient_clipping", "none")).lower() not in ("none", "auto"):
        config["gradient_clipping"] = float(section["gradient_clipping"])
    precision = str(content.get("mixed_precision", "no"))
    if precision in ("bf16", "fp16"):
        config[precision] = {"enabled": True}
    return config


def _number(value: Any) -> Any:
    """A number that YAML may have as text; auto is the Trainer's default, 1, and what is none is refused later."""
    text = str(value)
    return 1 if text == "auto" else int(text) if text.isdecimal() else value


def _of_fsdp(content: dict[str, Any]) -> Configuration:
    section = {str(key).removeprefix("fsdp_"): value for key, value in (content.get("fsdp_config") or {}).items()}
    version = int(section.get("version", 1))
    notes = (f"sharded by torch's FSDP{version}, layer by layer; of fsdp_config nothing else is read",)
    options: dict[str, Any] = {"fsdp": version}
    if version == 1:
        options["use_orig_params"] = str(section.get("use_orig_params", True)).lower() == "true"
    configuration = configuration_of_mapping(options)
    return replace(configuration, title=f"accelerate {configuration.title}", notes=notes)


def prepared_engine(configuration: Configuration, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The DeepSpeed engine that `Accelerator.prepare` makes of model and optimizer."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    _forget_accelerators()
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    try:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if not torch.cuda.is_available():
            PartialState(backend="gloo")  # else it takes every rank for the only one
        plugin = DeepSpeedPlugin(hf_ds_config=dict(configuration.options))
        accelerator = Accelerator(deepspeed_plugin=plugin)
        engine, _ = accelerator.prepare(model, optimizer)
        return engine
    finally:
        if asked is None:
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        _forget_accelerators()


def _forget_accelerators() -> None:
    """Accelerate keeps what the first Accelerator of a process was, which the next one must not find."""
    from accelerate.state import AcceleratorState, GradientState

    INTERNALS.read(AcceleratorState, "_reset_state")(reset_partial_state=True)
    INTERNALS.read(GradientState, "_reset_state")()
