"""What is checked before any work is done: configuration, batch division, memory, and the run that is continued."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch.optim import Optimizer

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.kernels.choice import choose
from trustratio.optimizers.kernels.interface import ImplementationError

from ..common.errors import NothingToDo, RecipeError
from ..common.files import require_writable
from ..configuration.batch_growth import growths_of, most_updates
from ..configuration.command_line import Invocation
from ..configuration.config import MODERNBERT_FIELDS, RecipeConfig
from ..configuration.phases import Phase, phases_of
from ..configuration.ranges import check_ranges
from ..data.choices import check_data
from ..data.given_masks import AS_GIVEN
from ..model.attention import attention_of
from ..model.build import outline
from ..model.optimizer import is_baseline
from ..planning.demands import check_demands, check_first_groups, check_groups
from ..planning.memory import GIB, memory_parts, model_size
from ..planning.phase_plan import check_fits
from ..rules.global_batch import BatchPlan
from ..runs.checkpoints import (
    RANKS,
    STATE_DTYPE,
    check_same_run,
    describe_checkpoint,
    require_newest,
    run_of,
)
from ..runs.folder import RUNS, has_ended, require_free
from ..runs.loggers import check_loggers
from .deepspeed_schema import check_settings
from .deepspeed_settings import merge, precision_of, stage_of, without_batch_sizes
from .growth_state import has_read_all
from .launchers import DeepSpeedLauncher, Launcher
from .other_ranks import require_readable, shared_anew
from .ranks import local_rank, ranks_on_machine, world_size
from .second_pass import check_second_pass


@dataclasses.dataclass(frozen=True)
class CheckedRun:
    """A configuration that passed every check that needs no data.

    Attributes:
        invocation: the command line, with the configuration completed from the DeepSpeed file.
        launcher: what wraps the model.
        plans: micro-batch, accumulation and ranks of each phase; of its smallest batch where batches grow.
        settings: complete DeepSpeed configuration, None without DeepSpeed.
        first: updates already done by the checkpoint to resume, else 0.
        last: updates to end at, over all phases; the most that it can be where batches grow.
        saved_identity: what the checkpoint says a continued run must agree with, else None.
    """

    invocation: Invocation
    launcher: Launcher
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

    @property
    def most_accumulation(self) -> int:
        """The most micro-batches that an update of any phase has on a rank."""
        largest = [growth.largest for growth in growths_of(self.config)]
        batches = largest or [plan.sequences for plan in self.plans]
        return max(batch // (plan.micro * plan.ranks) for batch, plan in zip(batches, self.plans, strict=True))


def check_run(invocation: Invocation, launcher: Launcher | None = None) -> CheckedRun:
    """Check everything that can be checked without reading data, and complete the configuration.

    Args:
        invocation: the command line.
        launcher: what wraps the model; None: DeepSpeed's.

    Raises:
        RecipeError: any of the bad input that the recipe knows of.
    """
    launcher = launcher or DeepSpeedLauncher()
    settings = launcher.settings(invocation)
    if settings is not None:
        check_settings(settings)
    config = complete_config(invocation, settings)
    invocation = dataclasses.replace(invocation, config=config)
    check_ranges(config)
    _, optimizer = outline(config)  # refuses optimizers and their options before any data are read
    attention_of(config)  # refuses what is not installed
    _require_kernels(optimizer)
    if invocation.resume is not None:
        config = _check_resumable(invocation, config)
        invocation = dataclasses.replace(invocation, config=config)
    plans = _plans_of(config, world_size())
    if settings is not None:
        settings = merge(
            settings,
            plans[0],
            config.training.zero_stage,
            config.training.precision,
            config.training.gradient_clipping,
            elementwise=is_baseline(config.optimizer.name),
            saved=_keeps_its_sums(invocation),
            master=config.training.master,
        )
    check_loggers(config.run.loggers)
    check_demands(config)
    check_second_pass(config, settings)
    for plan in plans:
        check_groups(config, plan)
    check_first_groups(config, plans[0])
    check_data(config.data)
    last = _last_update(config, invocation)
    run = CheckedRun(invocation, launcher, plans, settings, first=0, last=last, saved_identity=None)
    require_memory(run, None)
    # Last, what is on disk: the checkpoint to go on from, or an output folder that nothing is in.
    if invocation.resume is not None:
        run = _check_resume(run, invocation.resume)
    else:
        _check_output(invocation)
    return run


def _keeps_its_sums(invocation: Invocation) -> bool:
    """Tell whether a run is continued that an earlier release began, which left the sums of gradients to DeepSpeed."""
    if invocation.resume is None or invocation.deepspeed_config is not None:
        return False
    saved = describe_checkpoint(invocation.resume)["identity"].get("deepspeed") or {}
    return "data_types" not in saved


def _plans_of(config: RecipeConfig, ranks: int) -> tuple[BatchPlan, ...]:
    """Return the division of each phase's batch, of the smallest one where batches grow."""
    growths = growths_of(config)
    return tuple(part.plan(ranks) for part in growths or phases_of(config))


def _last_update(config: RecipeConfig, invocation: Invocation) -> int:
    """Return after how many updates the run ends, at the latest."""
    total = most_updates(config)
    if config.run.batch_from_noise and invocation.resume is not None:
        total += describe_checkpoint(invocation.resume)["step"]
    return min(total, invocation.max_steps or total)


def _require_kernels(optimizer: Optimizer) -> None:
    """Check that the implementation that TRUSTRATIO_IMPLEMENTATION or an option asks for is there.

    Raises:
        RecipeError: it is unknown, or works neither on the accelerator nor on the host, where offloaded state lies.
    """
    if not isinstance(optimizer, LayerwiseOptimizer):
        return
    refusals = []
    for device in dict.fromkeys((get_accelerator().device_name(), "cpu")):
        try:
            choose(optimizer.implementation, torch.device(device))
            return
        except (ImplementationError, ValueError) as error:
            refusals.append(error)
    raise RecipeError(str(refusals[0])) from refusals[0]


def complete_config(invocation: Invocation, settings: dict[str, Any] | None) -> RecipeConfig:
    """Return the configuration with ZeRO stage and precision settled between command line, file and device.

    Args:
        invocation: the command line.
        settings: DeepSpeed settings that the user gave; None without DeepSpeed, where nothing is sharded.

    Raises:
        RecipeError: command line and file contradict each other.
    """
    training = invocation.config.training
    stage = 0 if settings is None else stage_of(settings)
    if stage is not None:
        _require_agreement(invocation, settings, "zero_stage", training.zero_stage, stage)
        training = dataclasses.replace(training, zero_stage=stage)
    precision = None if settings is None else precision_of(settings)
    if precision is not None:
        _require_agreement(invocation, settings, "precision", training.precision, precision)
        training = dataclasses.replace(training, precision=precision)
    elif training.precision == "auto":
        best = _best_precision() if training.master is None else "bf16"
        training = dataclasses.replace(training, precision=best)
    if settings is None and training.precision == "fp16":
        raise RecipeError("--precision fp16 needs DeepSpeed, which scales the loss: use a zero*.yaml, or bf16")
    return dataclasses.replace(invocation.config, training=training)


def _require_agreement(
    invocation: Invocation, settings: dict[str, Any] | None, name: str, asked: int | str, in_file: int | str
) -> None:
    """Refuse a field of the command line that the file sets to something else."""
    if f"training.{name}" in invocation.given and asked not in (in_file, "auto"):
        kind = "DDP" if settings is None else "DeepSpeed"
        where, instead = f"the {kind} configuration", "give it in one place"
        if invocation.resume is not None:
            where, instead = f"{where} of the run that is continued", "leave it out"
        raise RecipeError(f"--{name} {asked} contradicts {where}, which has {in_file}; {instead}")


def _best_precision() -> str:
    # On a CPU bf16 pays off for large models only, and not on every CPU; it stays a choice there.
    on_gpu = get_accelerator().device_name() != "cpu"
    return "bf16" if on_gpu and get_accelerator().is_bf16_supported() else "fp32"


def require_memory(run: CheckedRun, vocabulary_size: int | None) -> None:
    """Check that the run fits into this GPU; on a CPU, that this machine could hold it at all.

    A dry run on a CPU is let pass: it may be of a run that is planned for another machine.

    Raises:
        RecipeError: it does not; the message has the plan's numbers.
    """
    memory = device_memory()
    if memory is not None:
        check_fits(run.config, vocabulary_size, run.plans[0].ranks, memory, run.settings)
    elif not run.invocation.dry_run:
        _require_host_memory(run, vocabulary_size)


def _require_host_memory(run: CheckedRun, vocabulary_size: int | None) -> None:
    """Refuse what is certain not to fit: the plan without its buffers, which are as large as there is need on a CPU."""
    size, ranks, memory = model_size(run.config, vocabulary_size), ranks_on_machine(), psutil.virtual_memory().total
    for phase, plan in zip(run.phases, run.plans, strict=True):
        parts = memory_parts(size, run.config, phase, plan.micro, plan.ranks, run.settings)
        certain = [part for part in parts if part.held or part.name == "activations"]
        needed = ranks * sum(part.bytes for part in certain if part.name != "reduction bucket")
        if needed > memory:
            raise RecipeError(
                f"phase {phase.number} needs at least {needed / GIB:.0f} GiB for {plan.micro} sequences of "
                f"{phase.sequence_length} on {ranks} ranks, and this machine has {memory / GIB:.0f} GiB; use a smaller "
                "--micro_batch or a smaller model"
            )


def device_memory() -> int | None:
    """Return the bytes of this rank's GPU, None on a CPU."""
    if not torch.cuda.is_available() or get_accelerator().device_name() != "cuda":
        return None
    return torch.cuda.get_device_properties(local_rank() % torch.cuda.device_count()).total_memory


def _check_resumable(invocation: Invocation, config: RecipeConfig) -> RecipeConfig:
    """Check a checkpoint before its batch is shared out: that it is of this run, has work left, and that ranks fit.

    Returns:
        The configuration, with micro-batches that this number of ranks can share out.

    Raises:
        RecipeError: another run's checkpoint, or a number of ranks that does not divide the global batch.
        NothingToDo: the run is finished.
    """
    checkpoint = invocation.resume
    assert checkpoint is not None
    description = describe_checkpoint(checkpoint)
    check_same_run(description["identity"], _identity_of(config), checkpoint)
    last, done = _last_update(config, invocation), description["step"]
    grows = config.run.batch_from_noise
    finished = done >= last or (grows and has_read_all(checkpoint, phases_of(config)))
    if finished and not _lacks_its_end(invocation, checkpoint):
        last = done if grows else last
        raise NothingToDo(
            f"{checkpoint} is at step {done} and the run ends at step {last}: nothing is left to do; raise --steps or "
            "--max_steps to go on"
        )
    return shared_anew(config, invocation.given, checkpoint, description["identity"].get(RANKS), world_size())


def _lacks_its_end(invocation: Invocation, checkpoint: Path) -> bool:
    """Tell whether the checkpoint's run was killed between its last checkpoint and the end of what follows that."""
    return _is_continued_in_place(invocation, checkpoint) and not has_ended(run_of(checkpoint))


def _is_continued_in_place(invocation: Invocation, checkpoint: Path) -> bool:
    return invocation.output is None or invocation.output.resolve() == run_of(checkpoint)


def _check_resume(run: CheckedRun, checkpoint: Path) -> CheckedRun:
    description = describe_checkpoint(checkpoint)
    run = dataclasses.replace(run, first=description["step"], saved_identity=description["identity"])
    check_same_run(description["identity"], early_identity(run), checkpoint)
    require_readable(checkpoint, description["identity"].get(RANKS), world_size(), run.config.training.zero_stage)
    if _is_continued_in_place(run.invocation, checkpoint):
        require_newest(checkpoint, run.invocation.overwrite)
    else:
        _check_output(run.invocation)
    return run


def _check_output(invocation: Invocation) -> None:
    if invocation.output is None or invocation.overwrite:
        require_writable(invocation.output or RUNS)
    else:
        require_free(invocation.output)


def early_identity(run: CheckedRun) -> dict[str, Any]:
    """Return what a resumed run must agree with, as far as it is known before the data are read, and its ranks."""
    return {
        **_identity_of(run.config),
        RANKS: run.plans[0].ranks,
        STATE_DTYPE: run.config.training.state_dtype,
        "deepspeed": None if run.settings is None else without_batch_sizes(run.settings),
    }


def _identity_of(config: RecipeConfig) -> dict[str, Any]:
    values, training = config.to_dict(), config.training
    return {
        "model": _model_identity(config),
        "optimizer": values["optimizer"],
        "sequence_length": config.data.sequence_length,
        "mask_probability": config.data.mask_probability,
        "masks": AS_GIVEN if config.data.masks == AS_GIVEN else None,
        "discard_smallest": config.data.discard_smallest or None,  # earlier releases' checkpoints do not have it
        "global_batch": training.global_batch,
        "batch_from_noise": _growth(config),
        "batch_warmup": _warmup(config),
        **_second_phase(config),
        "seed": training.seed,
        "precision": training.precision,
        "master": training.master,
        "zero_stage": training.zero_stage,
    }


def _model_identity(config: RecipeConfig) -> dict[str, Any]:
    """Return the model's fields that a resumed run must agree with, of BERT those that earlier releases had."""
    others = ["attention"]
    if config.model.architecture == "bert":
        others += ["architecture", *MODERNBERT_FIELDS]
    return {name: value for name, value in config.to_dict()["model"].items() if name not in others}


def _growth(config: RecipeConfig) -> dict[str, Any] | None:
    """Return the rule of a batch that follows the gradient noise; None of one that stays."""
    run = config.run
    if not run.batch_from_noise:
        return None
    sizes = {f"phase {growth.phase.number}": [growth.smallest, growth.largest] for growth in growths_of(config)}
    return {**sizes, "every": run.batch_every, "noise_per_batch": run.noise_per_batch}


def _warmup(config: RecipeConfig) -> dict[str, int] | None:
    """Return the warm-up of the batch; None where there is none."""
    if not config.run.batch_warmup:
        return None
    warmup = growths_of(config)[0].schedule()
    return dataclasses.asdict(warmup)


def _second_phase(config: RecipeConfig) -> dict[str, Any]:
    """Return what a resumed run of two phases must agree with besides: where the border is, and what follows."""
    if not config.phase_two.steps:
        return {}
    second = config.to_dict()["phase_two"]
    free = ["micro_batch", "steps"]
    # Earlier releases' checkpoints do not have these.
    if config.schedule.shape != "wsd":
        free.append("cooldown")
    if second["global_rope_theta"] is None:
        free.append("global_rope_theta")
    return {
        "phase_one_steps": config.training.steps,
        "phase_two": {name: value for name, value in second.items() if name not in free},
    }
