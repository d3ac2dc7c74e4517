"""How a model is to be sharded: what the user wrote, read, checked, and made to fit a run of single samples."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CannotAudit

__all__ = ["FILLED", "Configuration", "configuration_of_mapping", "read_json"]

OF_THE_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "data_efficiency", "curriculum_learning")
UNSUPPORTED = ("tensor_parallel", "pipeline", "sequence_parallel_size", "compression_training")
PRECISIONS = ("bf16", "fp16")
SECTIONS = ("zero_optimization", *PRECISIONS)
OFFLOAD = ("offload_optimizer", "offload_param")
SCALES = ("loss_scale", "min_loss_scale")
FP16_WITHOUT_ZERO = (
    "fp16 without ZeRO: DeepSpeed 0.19.8 divides gradients by the loss scale, and engine.backward has not multiplied "
    "the loss by it, so that every optimizer gets gradients that are too small: take stage 1"
)
CLIPPING_OF_DEEPSPEED = 1.0  # where the JSON has no gradient_clipping

# What may be auto ----------------------------------------------------------------------------------------------------

FILLED: dict[str, tuple[Any, str]] = {
    "gradient_accumulation_steps": (1, "the Trainer's gradient_accumulation_steps"),
    "gradient_clipping": (1.0, "the Trainer's max_grad_norm"),
    "bf16.enabled": (False, "the Trainer's bf16"),
    "fp16.enabled": (False, "the Trainer's fp16"),
    "zero_optimization.stage": (2, "accelerate's zero_stage"),
    "zero_optimization.offload_optimizer.device": ("none", "accelerate's offload_optimizer_device"),
    "zero_optimization.offload_param.device": ("none", "accelerate's offload_param_device"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (False, "accelerate's zero3_save_16bit_model"),
    "optimizer.params.lr": (5e-5, "the Trainer's learning_rate"),
    "optimizer.params.betas": ([0.9, 0.999], "the Trainer's adam_beta1 and adam_beta2"),
    "optimizer.params.eps": (1e-8, "the Trainer's adam_epsilon"),
    "optimizer.params.weight_decay": (0.0, "the Trainer's weight_decay"),
}
"""The value where nobody gives another, and whose default it is."""
OF_THE_HIDDEN_SIZE = tuple(
    f"zero_optimization.{key}"
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
)
LATER = tuple(
    f"scheduler.params.{key}" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
)
"""Of which the Trainer knows some alone, so that the whole section is left out."""


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

    def noting(self, note: str) -> Configuration:
        """The same with one more note."""
        return replace(self, notes=(*self.notes, note))

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's, 0 under every other wrapper."""
        stage: int = self.options.get("zero_optimization", {}).get("stage", 0) if self.wrapper == "deepspeed" else 0
        return stage

    @property
    def keeps_masters(self) -> bool:
        """Whether fp32 weights are stepped, whatever the model's dtype under DeepSpeed is; True elsewhere."""
        return not (self.dtype == "bf16" and self.options.get("bf16", {}).get("bf16_master_weights_and_grads"))

    @property
    def clips_what_is_stepped(self) -> bool:
        """Whether the norm for clipping is of the optimizer's layers alone: under ZeRO, and in DeepSpeed's 16 bits."""
        return self.wrapper == "deepspeed" and (self.zero_stage > 0 or self.dtype != "fp32")

    @property
    def offloads_optimizer(self) -> bool:
        """Whether DeepSpeed keeps the optimizer's state elsewhere."""
        section = self.options.get("zero_optimization", {}) if self.wrapper == "deepspeed" else {}
        return _offloads(section)


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
    config = _without_auto(config, "", notes)
    if "scheduler" in config and "auto" in str(config["scheduler"]):
        del config["scheduler"]
        notes.append("the scheduler section is left out: its auto values are known to the Trainer alone")
    _refuse_values(config)
    accumulation = config.setdefault("gradient_accumulation_steps", 1)
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise CannotAudit(f"gradient_accumulation_steps must be a whole number of at least 1, not {accumulation!r}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage and not config.get("zero_allow_untested_optimizer"):
        config["zero_allow_untested_optimizer"] = True
        notes.append("zero_allow_untested_optimizer was set, without which DeepSpeed refuses unknown optimizers")
    config.update(train_micro_batch_size_per_gpu=1, steps_per_print=10**9, wall_clock_breakdown=False)
    dtypes = [dtype for dtype in PRECISIONS if config.get(dtype, {}).get("enabled")]
    if "fp16" in dtypes:
        config["fp16"] = _with_exact_scales(config["fp16"], notes)
        if not stage and config["fp16"].get("loss_scale") != 1:
            notes.append(FP16_WITHOUT_ZERO)
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
        if not isinstance(key, str):
            raise CannotAudit(f"the names of settings are texts, not {key!r}")
        if key in ("stage", *OFFLOAD):
            raise CannotAudit(f"{key} belongs into the section zero_optimization of a DeepSpeed configuration")
        if key.startswith("fsdp") or (key not in SECTIONS and difflib.get_close_matches(key, SECTIONS, cutoff=0.8)):
            raise CannotAudit(f"{key} is no setting of DeepSpeed: there are zero_optimization, bf16, fp16")


def _refuse_values(config: dict[str, Any]) -> None:
    """Raise CannotAudit for what would be read otherwise here than by DeepSpeed."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3:
        raise CannotAudit(f"zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    for precision in PRECISIONS:
        for key in ("enabled", f"{precision}_master_weights_and_grads"):
            given = config.get(precision, {}).get(key, False)
            if not isinstance(given, bool):
                raise CannotAudit(f"{precision}.{key} must be true or false, not {given!r}")


def _with_exact_scales(section: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The section with powers of two for loss scales, by which fp16 gradients are multiplied without rounding."""
    kept = dict(section)
    for key in filter(section.__contains__, SCALES):
        kept[key] = scale = _number(section[key])
        if isinstance(scale, int | float) and 0 < scale < math.inf and math.frexp(scale)[0] != 0.5:
            kept[key] = math.ldexp(0.5, math.frexp(scale)[1])
            notes.append(
                f"fp16.{key} is {scale:g}, and {kept[key]:g} is taken: by what is no power of two fp16 gradients are "
                "rounded once more in the last bit, under any sharding"
            )
    return kept


def _number(given: Any) -> Any:
    """What DeepSpeed reads from it: a text may be a number."""
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given  # which DeepSpeed refuses


def _title(stage: int, dtypes: list[str], config: dict[str, Any]) -> str:
    offload = _offloads(config.get("zero_optimization", {}))
    return " ".join(["DeepSpeed", f"ZeRO-{stage}", *dtypes, *(["offload"] if offload else [])])


def _offloads(zero: dict[str, Any]) -> bool:
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def _without_auto(section: dict[str, Any], path: str, notes: list[str]) -> dict[str, Any]:
    """The section with what the Trainer fills in, by its defaults, or DeepSpeed's; named in the notes.

    Raises:
        CannotAudit: If it has an auto that the Trainer leaves, which DeepSpeed cannot read.
    """
    kept: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            kept[key] = _without_auto(value, f"{name}.", notes)
        elif value != "auto" or name in LATER:
            kept[key] = value
        elif name in FILLED:
            filled, of = FILLED[name]
            kept[key] = filled
            notes.append(f"{name}: auto is read as {json.dumps(filled)}, the default of {of}")
        elif name in OF_THE_HIDDEN_SIZE:
            notes.append(
                f"{name}: auto is left to DeepSpeed's default, where the Trainer takes a number by the model's "
                "config.hidden_size; steps do not depend on it"
            )
        else:
            raise CannotAudit(f"{name}: auto is none of those that the Trainer or accelerate fill in: write a value")
    return kept
