"""The launchers that start the recipe: DeepSpeed's (or torchrun, or none), and `accelerate launch`.

A launcher says which DeepSpeed settings the user chose, and wraps the recipe's parts in a `TrainingEngine`. Everything
else, the data order, the loss and the schedule among it, is the same, so the losses are too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch.nn.parallel import DistributedDataParallel

from ..common.errors import RecipeError
from ..configuration.command_line import Invocation
from ..configuration.config import TrainingConfig
from ..model.build import RecipeParts
from ..rules.global_batch import BatchPlan
from ..runs.checkpoints import run_of
from ..runs.folder import DEEPSPEED_CONFIG
from .deepspeed_settings import as_given, load_file
from .engines import DataParallelTraining, DeepSpeedTraining, TrainingEngine


class Launcher(Protocol):
    """What started this process, as far as the recipe depends on it."""

    def settings(self, invocation: Invocation) -> dict[str, Any] | None:
        """Return the DeepSpeed settings that the user gave, {} if none, None if DeepSpeed is not used."""

    def engine(
        self, parts: RecipeParts, training: TrainingConfig, plan: BatchPlan, settings: dict[str, Any] | None
    ) -> TrainingEngine:
        """Wrap model, optimizer and schedule (collective).

        Args:
            parts: see `RecipeParts`.
            training: precision and clipping.
            plan: batch division of the first phase.
            settings: complete DeepSpeed settings, None without DeepSpeed.
        """


class DeepSpeedLauncher:
    """`deepspeed recipes/bert.py`, `torchrun recipes/bert.py`, or one process of `python recipes/bert.py`."""

    def settings(self, invocation: Invocation) -> dict[str, Any] | None:
        """Return the file's settings; a resumed run that is given no file keeps those it was started with."""
        if invocation.deepspeed_config is not None:
            return load_file(invocation.deepspeed_config)
        if invocation.resume is None:
            return {}
        saved = run_of(invocation.resume) / DEEPSPEED_CONFIG
        if not saved.exists():
            raise RecipeError(f"{saved.parent} was trained without DeepSpeed; continue it with bert_accelerate.py")
        return as_given(load_file(str(saved)))

    def engine(
        self, parts: RecipeParts, training: TrainingConfig, plan: BatchPlan, settings: dict[str, Any] | None
    ) -> TrainingEngine:
        """Wrap by `deepspeed.initialize`."""
        assert settings is not None
        return DeepSpeedTraining.initialize(parts.model, parts.optimizer, parts.schedule, settings)


class AccelerateLauncher:
    """`accelerate launch --config_file recipes/configs/NAME.yaml recipes/bert_accelerate.py`."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Read what `accelerate launch` put into the environment."""
        self.environment = os.environ if environment is None else environment

    def settings(self, invocation: Invocation) -> dict[str, Any] | None:
        """Return the DeepSpeed settings of accelerate's configuration, None for plain data parallelism.

        Raises:
            RecipeError: a combination that accelerate would silently do something else with.
        """
        if invocation.deepspeed_config is not None:
            raise RecipeError(
                "--deepspeed_config belongs to bert.py; under accelerate name the file in accelerate's configuration, "
                "as deepspeed_config_file in its section deepspeed_config"
            )
        for name in ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
            if self._enabled(f"ACCELERATE_USE_{name}"):
                raise RecipeError(
                    f"accelerate's configuration asks for {name}, which this recipe has no engine for; use one of "
                    "recipes/configs (`trustratio configs` says where): ddp.yaml, zero1.yaml, zero2.yaml, zero3.yaml"
                )
        if not self._enabled("ACCELERATE_USE_DEEPSPEED"):
            if self._precision() == "fp16":
                raise RecipeError("mixed_precision: fp16 needs DeepSpeed in this recipe; use bf16, or a zero*.yaml")
            return None
        if self._enabled("ACCELERATE_USE_CPU"):
            raise RecipeError(
                "use_cpu: true makes accelerate ignore DeepSpeed without a word; remove it (on a machine with GPUs "
                "set DS_ACCELERATOR=cpu instead), or use recipes/configs/ddp.yaml"
            )
        settings = self._deepspeed()
        if self._precision() in ("bf16", "fp16"):
            settings.setdefault(self._precision(), {"enabled": True})
        return settings

    def engine(
        self, parts: RecipeParts, training: TrainingConfig, plan: BatchPlan, settings: dict[str, Any] | None
    ) -> TrainingEngine:
        """Wrap by `Accelerator.prepare`."""
        if settings is None:
            return self._data_parallel(parts, training)
        from accelerate import Accelerator, DeepSpeedPlugin

        # The launcher's list of fields, which accelerate holds against a complete configuration.
        with without_variable(os.environ, "ACCELERATE_CONFIG_DS_FIELDS"):
            plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            mixed_precision=mixed_precision(training, settings),
            gradient_accumulation_steps=plan.accumulation,
        )
        engine, _ = accelerator.prepare(parts.model, parts.optimizer)
        if not isinstance(engine, DeepSpeedEngine):
            raise RecipeError(f"accelerate made a {type(engine).__name__} where its configuration asks for DeepSpeed")
        return DeepSpeedTraining(engine, parts.optimizer, parts.schedule)

    def _data_parallel(self, parts: RecipeParts, training: TrainingConfig) -> TrainingEngine:
        from accelerate import Accelerator

        on_cpu = get_accelerator().device_name() == "cpu"  # else accelerate would not wrap for several CPU processes
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision(training))
        model = accelerator.prepare(parts.model)
        if dist.get_world_size() > 1 and not isinstance(model, DistributedDataParallel):
            raise RecipeError(
                f"accelerate left the model a {type(model).__name__}: {dist.get_world_size()} processes would train "
                "apart from each other; use recipes/configs/ddp.yaml"
            )
        return DataParallelTraining(
            model, parts.optimizer, parts.schedule, accelerator.device, training.gradient_clipping
        )

    def _deepspeed(self) -> dict[str, Any]:
        file = self.environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file != "none":
            return load_file(file)
        from accelerate import DeepSpeedPlugin

        # What accelerate's own fields say. Its batch sizes are not the recipe's: it would take the accumulation from
        # its configuration, where 1 is the default.
        settings = DeepSpeedPlugin().deepspeed_config
        zero = {key: value for key, value in settings["zero_optimization"].items() if not _is_unused(value)}
        clipping = {key: value for key, value in settings.items() if key == "gradient_clipping"}
        return {**clipping, "zero_optimization": zero}

    def _enabled(self, name: str) -> bool:
        return self.environment.get(name, "false").lower() in ("true", "1")

    def _precision(self) -> str:
        return self.environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def mixed_precision(training: TrainingConfig, settings: Mapping[str, Any] | None = None) -> str:
    """Return what accelerate or DeepSpeed is to compute in, "no" where that is what the model is given in.

    Args:
        training: precision and masters.
        settings: complete DeepSpeed settings, None without DeepSpeed.
    """
    if training.master is not None and "bf16" not in (settings or {}):
        return "no"
    return "no" if training.precision == "fp32" else training.precision


def launcher_of_this_process() -> Launcher:
    """Return accelerate's launcher if it started this process, else DeepSpeed's, which also stands for none."""
    # `accelerate launch` always sets this variable.
    return AccelerateLauncher() if "ACCELERATE_MIXED_PRECISION" in os.environ else DeepSpeedLauncher()


def _is_unused(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device") in (None, "none")


@contextlib.contextmanager
def without_variable(environment: MutableMapping[str, str], name: str) -> Iterator[None]:
    """Leave a variable out of an environment for a while."""
    value = environment.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            environment[name] = value
