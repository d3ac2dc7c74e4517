"""What is checked before any work is done: configuration, batch division, memory, and the run that is continued."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ..common.errors import RecipeError
from ..configuration.command_line import Invocation
from ..configuration.config import RecipeConfig
from ..configuration.phases import Phase, phases_of
from ..configuration.ranges import check_ranges
from ..data.prepared import check_sources
from ..model.build import outline
from ..model.optimizer import is_baseline
from ..planning.phase_plan import check_fits
from ..rules.global_batch import BatchPlan
from ..runs.checkpoints import check_same_run, describe_checkpoint, require_newest, run_of
from ..runs.folder import require_free
from ..runs.loggers import check_loggers
from .deepspeed_settings import merge, precision_of, refuse_unsupported, stage_of, without_batch_sizes
from .launchers import DeepSpeedFrontEnd, FrontEnd
from .ranks import local_rank, world_size
from .step_metrics import check_noise_scale


@dataclasses.dataclass(frozen=True)
class CheckedRun:
    """A configuration that passed every check that needs no data.

    Attributes:
        invocation: the command line, with the configuration completed from the DeepSpeed file.
        front_end: what wraps the model.
        plans: micro-batch, accumulation and ranks of each phase.
        settings: complete DeepSpeed configuration, None without DeepSpeed.
        first: updates already done by the checkpoint to resume, else 0.
        last: updates to end at, over all phases.
        saved_identity: what the checkpoint says a continued run must agree with, else None.
    """

    invocation: Invocation
    front_end: FrontEnd
    plans: tuple[BatchPlan, ...]
    settings: dict[str, Any] | None
    first: int
    last: int
    saved_identity: dict[str, Any] | None

    @property
    def config(self) -> RecipeConfig:
        """The resolved configuration."""
        return self.invocation.config

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the configuration, one for each of `plans`."""
        return phases_of(self.config)


def check_run(invocation: Invocation, front_end: FrontEnd | None = None) -> CheckedRun:
    """Check everything that can be checked without reading data, and complete the configuration.

    Raises:
        RecipeError: any of the bad input that the recipe knows of.
    """
    front_end = front_end or DeepSpeedFrontEnd()
    given = front_end.settings(invocation)
    if given is not None:
        refuse_unsupported(given)
    config = complete_config(invocation, given)
    invocation = dataclasses.replace(invocation, config=config)
    check_ranges(config)
    outline(config)  # refuses optimizers and their options before any data are read
    training, phases = config.training, phases_of(config)
    plans = tuple(phase.plan(world_size()) for phase in phases)
    settings = given
    if given is not None:
        settings = merge(
            given,
            plans[0],
            training.zero_stage,
            training.precision,
            training.gradient_clipping,
            elementwise=is_baseline(config.optimizer.name),
        )
    check_loggers(config.run.loggers)
    for plan in plans:
        check_noise_scale(config, plan)
    check_sources(config.data.sources)
    total = phases[-1].last
    last = min(total, invocation.max_steps or total)
    run = CheckedRun(invocation, front_end, plans, settings, first=0, last=last, saved_identity=None)
    require_memory(run, None)
    if invocation.resume is not None:
        run = _check_resume(run, invocation.resume)
    elif invocation.output is not None and not invocation.overwrite:
        require_free(invocation.output)
    return run


def complete_config(invocation: Invocation, settings: dict[str, Any] | None) -> RecipeConfig:
    """Return the configuration with ZeRO stage and precision settled between command line, file and device.

    Args:
        invocation: the command line.
        settings: DeepSpeed settings that the user gave; None without DeepSpeed, where nothing is sharded.

    Raises:
        RecipeError: command line and file contradict each other.
    """
    config = invocation.config
    training = config.training
    for name, in_file in (
        ("zero_stage", 0 if settings is None else stage_of(settings)),
        ("precision", None if settings is None else precision_of(settings)),
    ):
        if in_file is None:
            continue
        if f"training.{name}" in invocation.given and getattr(training, name) not in (in_file, "auto"):
            raise RecipeError(
                f"--{name} {getattr(training, name)} contradicts the {'DDP' if settings is None else 'DeepSpeed'} "
                f"configuration, which has {in_file}; give it in one place"
            )
        training = dataclasses.replace(training, **{name: in_file})
    if training.precision == "auto":
        training = dataclasses.replace(training, precision=_best_precision())
    return dataclasses.replace(config, training=training)


def require_memory(run: CheckedRun, vocabulary_size: int | None) -> None:
    """Check that the run fits into this GPU, where there is one.

    Raises:
        RecipeError: it does not; the message has the plan's numbers.
    """
    memory = device_memory()
    if memory is not None:
        check_fits(run.config, vocabulary_size, run.plans[0].ranks, memory, run.settings)


def device_memory() -> int | None:
    """Return the bytes of this rank's GPU, None on a CPU."""
    if not torch.cuda.is_available() or get_accelerator().device_name() != "cuda":
        return None
    return torch.cuda.get_device_properties(local_rank() % torch.cuda.device_count()).total_memory


def early_identity(run: CheckedRun) -> dict[str, Any]:
    """Return what a resumed run must agree with, as far as it is known before the data are read."""
    values = run.config.to_dict()
    training = run.config.training
    return {
        "model": values["model"],
        "optimizer": values["optimizer"],
        "sequence_length": run.config.data.sequence_length,
        "mask_probability": run.config.data.mask_probability,
        "global_batch": training.global_batch,
        **_second_phase(run.config),
        "seed": training.seed,
        "precision": training.precision,
        "zero_stage": training.zero_stage,
        "ranks": run.plans[0].ranks,
        "deepspeed": None if run.settings is None else without_batch_sizes(run.settings),
    }


def _second_phase(config: RecipeConfig) -> dict[str, Any]:
    """Return what a resumed run of two phases must agree with besides: where the border is, and what follows."""
    if not config.phase_two.steps:
        return {}
    second = config.to_dict()["phase_two"]
    free = ("micro_batch", "steps")
    return {
        "phase_one_steps": config.training.steps,
        "phase_two": {name: value for name, value in second.items() if name not in free},
    }


def _check_resume(run: CheckedRun, checkpoint: Path) -> CheckedRun:
    description = describe_checkpoint(checkpoint)
    run = dataclasses.replace(run, first=description["step"], saved_identity=description["identity"])
    check_same_run(description["identity"], early_identity(run), checkpoint)
    if run.first >= run.last:
        raise RecipeError(
            f"{checkpoint} is at step {run.first} and the run ends at step {run.last}: nothing is left to do; "
            "raise --steps or --max_steps"
        )
    output = run.invocation.output
    if output is not None and output.resolve() != run_of(checkpoint) and not run.invocation.overwrite:
        require_free(output)
    if output is None or output.resolve() == run_of(checkpoint):
        require_newest(checkpoint, run.invocation.overwrite)
    return run


def _best_precision() -> str:
    # On a CPU bf16 pays off for large models only, and not on every CPU; it stays a choice there.
    on_gpu = get_accelerator().device_name() != "cpu"
    return "bf16" if on_gpu and get_accelerator().is_bf16_supported() else "fp32"
