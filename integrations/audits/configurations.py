"""How a model is to be sharded: what the user wrote, read, checked, and made to fit a run of single samples."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CannotAudit

__all__ = ["Configuration", "configuration_of_mapping", "read_json"]

OF_THE_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "data_efficiency", "curriculum_learning")
UNSUPPORTED = ("tensor_parallel", "pipeline", "sequence_parallel_size", "compression_training")
SECTIONS = ("zero_optimization", "bf16", "fp16")
OFFLOAD = ("offload_optimizer", "offload_param")
CLIPPING_OF_THE_TRAINER = 1.0
CLIPPING_OF_DEEPSPEED = 1.0  # where the JSON has no gradient_clipping


@dataclass(frozen=True)
class Configuration:
    """One way to shard.

    Attributes:
        wrapper: "ddp", "fsdp1", "fsdp2" or "deepspeed".
        title: For people, e.g. "DeepSpeed ZeRO-2".
        options: DeepSpeed's configuration, else further arguments of the wrapper.
        accumulation: Micro-batches per step.
        clipping: Norm to which the whole model's gradient is clipped, by the wrapper; None or 0: not.
        dtype: "fp32", "bf16" or "fp16": of the model under DeepSpeed.
        accelerate: The content of an accelerate YAML, where accelerate is to make the wrapper.
        notes: What was changed or filled in, for people.
    """

    wrapper: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    clipping: float | None = None
    dtype: str = "fp32"
    accelerate: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's, 0 under every other wrapper."""
        stage: int = self.options.get("zero_optimization", {}).get("stage", 0) if self.wrapper == "deepspeed" else 0
        return stage


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        CannotAudit: If it is none.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CannotAudit(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CannotAudit(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CannotAudit(f"{path} holds a {type(content).__name__}, where a configuration is a dict of settings")
    return content


def configuration_of_mapping(given: dict[str, Any]) -> Configuration:
    """Read {"fsdp": 1 or 2} or DeepSpeed's settings.

    Raises:
        CannotAudit: If they are of a kind that is not supported.
    """
    if "fsdp" not in given:
        return _of_deepspeed(given)
    version = given["fsdp"]
    if isinstance(version, bool) or not isinstance(version, int) or version not in (1, 2):
        raise CannotAudit(f"there are FSDP 1 (FullyShardedDataParallel) and 2 (fully_shard), not {version!r}")
    options = {key: value for key, value in given.items() if key != "fsdp"}
    return Configuration(f"fsdp{version}", f"FSDP{version}", options)


# DeepSpeed ----------------------------------------------------------------------------------------------------------


def _of_deepspeed(given: dict[str, Any]) -> Configuration:
    _refuse_kinds(given)
    notes: list[str] = []
    config = {key: value for key, value in given.items() if key not in OF_THE_BATCH}
    for section in UNSUPPORTED:
        if section in config:
            raise CannotAudit(f'the audit covers data parallelism, not the section "{section}": leave it out')
    if "optimizer" in config:
        kind = config["optimizer"].get("type") if isinstance(config["optimizer"], dict) else config["optimizer"]
        raise CannotAudit(
            f'the DeepSpeed configuration has an "optimizer" section ({kind}), from which DeepSpeed would make its '
            "own in place of the audited one: remove the section, as training with an optimizer object needs it too"
        )
    if config.get("gradient_clipping") == "auto":
        config["gradient_clipping"] = CLIPPING_OF_THE_TRAINER
        notes.append(f"gradient_clipping: auto is read as the Trainer's default, {CLIPPING_OF_THE_TRAINER:g}")
    config = _without_auto(config, "", notes)
    accumulation = config.setdefault("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise CannotAudit(f"gradient_accumulation_steps must be a whole number of at least 1, not {accumulation!r}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage and not config.get("zero_allow_untested_optimizer"):
        config["zero_allow_untested_optimizer"] = True
        notes.append("zero_allow_untested_optimizer was set, without which DeepSpeed refuses unknown optimizers")
    config.update(train_micro_batch_size_per_gpu=1, steps_per_print=10**9, wall_clock_breakdown=False)
    dtypes = [dtype for dtype in ("bf16", "fp16") if config.get(dtype, {}).get("enabled")]
    return Configuration(
        wrapper="deepspeed",
        title=_title(stage, dtypes, config),
        options=config,
        accumulation=accumulation,
        clipping=config.get("gradient_clipping", CLIPPING_OF_DEEPSPEED),
        dtype=dtypes[0] if dtypes else "fp32",
        notes=tuple(notes),
    )


def _refuse_kinds(given: dict[str, Any]) -> None:
    """Raise CannotAudit where sections are none, or where settings stand that DeepSpeed would pass over in silence."""
    zero = given.get("zero_optimization", {})
    of_zero = {f"zero_optimization.{key}": zero.get(key) for key in OFFLOAD} if isinstance(zero, dict) else {}
    for key, section in {**{key: given.get(key) for key in SECTIONS if key in given}, **of_zero}.items():
        if not isinstance(section, dict) and not (key in of_zero and section is None):
            raise CannotAudit(f"{key} must be a section of settings, as in {{...}}, not {section!r}")
    clipping = given.get("gradient_clipping", 0.0)
    if clipping != "auto" and (isinstance(clipping, bool) or not isinstance(clipping, int | float) or clipping < 0):
        raise CannotAudit(f"gradient_clipping must be a number of at least 0, or auto, not {clipping!r}")
    for key in given:
        if key in ("stage", *OFFLOAD):
            raise CannotAudit(f"{key} belongs into the section zero_optimization of a DeepSpeed configuration")
        if key.startswith("fsdp") or (key not in SECTIONS and difflib.get_close_matches(key, SECTIONS, cutoff=0.8)):
            raise CannotAudit(f"{key} is no setting of DeepSpeed: there are zero_optimization, bf16, fp16")


def _title(stage: int, dtypes: list[str], config: dict[str, Any]) -> str:
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    return " ".join(["DeepSpeed", f"ZeRO-{stage}", *dtypes, *(["offload"] if offload else [])])


def _without_auto(section: dict[str, Any], path: str, notes: list[str]) -> dict[str, Any]:
    """The section without what the Trainer would fill in, so that DeepSpeed's defaults hold; named in the notes."""
    kept = {}
    for key, value in section.items():
        if value == "auto":
            notes.append(f"{path}{key}: auto, which the Trainer fills in, is left to DeepSpeed's default")
        elif key == "scheduler" and "auto" in str(value):
            notes.append("the scheduler section is left out: its auto values are known to the Trainer alone")
        else:
            kept[key] = _without_auto(value, f"{path}{key}.", notes) if isinstance(value, dict) else value
    return kept
