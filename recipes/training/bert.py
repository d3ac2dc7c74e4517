"""Pretrain BERT: resolve and check the configuration, prepare the data, train, report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..common.errors import RecipeError, TrainingFailure
from ..common.machine import describe_machine
from ..common.reporter import Reporter, clock
from ..configuration.command_line import Invocation, parse_command_line
from ..configuration.config import DataConfig, RecipeConfig, check_ranges
from ..configuration.phases import Phase, carry_over, describe_plan, phases_of
from ..configuration.presets import list_presets
from ..data.feed import default_workers
from ..data.preparation import PreparedData, check_sources, prepare
from ..data.rows import MaskedRows
from ..model.build import build_parts, outline
from ..model.flops import ModelFlops, peak_of
from ..model.masked_language_model import padded_vocabulary
from ..model.optimizer import is_baseline
from ..planning.phase_plan import check_fits
from ..rules.global_batch import BatchPlan
from ..runs.folder import (
    CONFIG,
    DEEPSPEED_CONFIG,
    ENVIRONMENT,
    CheckpointFolder,
    check_same_run,
    claim_folder,
    describe_checkpoint,
    fresh_folder,
    require_free,
    require_newest,
    run_of,
    write_json,
)
from ..runs.loggers import MetricLoggers, check_loggers
from ..runs.report import write_report
from .deepspeed_settings import merge, precision_of, refuse_unsupported, stage_of, without_batch_sizes
from .engines import TrainingEngine
from .launchers import DeepSpeedFrontEnd, FrontEnd
from .loop import TrainingLoop
from .ranks import (
    collect,
    collect_failures,
    local_rank,
    on_each_machine,
    on_first_rank,
    rank,
    ranks_on_machine,
    start,
    world_size,
)
from .step_metrics import StepMetrics, check_noise_scale, measures_noise
from .stop_requests import StopRequests

BAD_INPUT = 2
FAILED = 3
INTERRUPTED = 130


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


def main(arguments: Sequence[str] | None = None, front_end: FrontEnd | None = None) -> int:
    """Run the recipe; return the process's exit status.

    0: finished, or stopped by Ctrl-C or SIGTERM with a checkpoint written. 2: bad input, with one message on the
    first rank. 3: training could not go on (the loss became NaN, a checkpoint could not be written); the report is
    drawn and the last good checkpoint named. 130: interrupted before training began.

    Args:
        arguments: the command line without the program's name; None: this process's.
        front_end: what wraps the model; None: DeepSpeed.
    """
    front_end = front_end or DeepSpeedFrontEnd()
    return run_command(arguments, lambda invocation: check_run(invocation, front_end), pretrain)


def run_command(
    arguments: Sequence[str] | None,
    check: Callable[[Invocation], CheckedRun],
    train: Callable[[CheckedRun, Reporter], None],
) -> int:
    """Read the command line, `check` it, announce the run and `train` it; return the exit status as `main` has it."""
    reporter = Reporter(active=rank() == 0)
    try:
        invocation = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        if invocation.list_presets:
            for line in list_presets():
                reporter.line(line)
            return 0
        run = check(invocation)
        announce(run, reporter)
        if not invocation.dry_run:
            train(run, reporter)
    except (RecipeError, TrainingFailure) as error:
        reporter.error(f"error: {error}")
        return FAILED if isinstance(error, TrainingFailure) else BAD_INPUT
    except KeyboardInterrupt:
        reporter.error("interrupted before training began; nothing was written")
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


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


def announce(run: CheckedRun, reporter: Reporter) -> None:
    """Print the resolved configuration and the plan of the phases."""
    reporter.line(f"preset {run.config.preset}, resolved configuration:")
    for section, fields in run.config.to_dict().items():
        if section != "preset":
            reporter.line("  " + " ".join(f"{section}.{name}={_shown(value)}" for name, value in fields.items()))
    for line in describe_plan(run.config, world_size()):
        reporter.line(line)


def pretrain(run: CheckedRun, reporter: Reporter) -> None:
    """Prepare the data, train from run.first to run.last and draw the report (all ranks).

    Raises:
        RecipeError: bad data, a checkpoint of other data, an output folder in use, refused optimizer options.
        TrainingFailure: training could not go on; the report is drawn, and the message names the last good checkpoint.
    """
    began = time.perf_counter()
    _quieten()
    start()
    config = run.config
    data, identity = prepare_run(run, reporter)
    engine = build_engine(run, data[0].vocabulary_size)
    # One folder for all ranks; claimed only now, so that bad data leave no empty run behind.
    folder = on_first_rank(lambda: claim_output(run))
    reporter.line(f"output folder: {folder}; {clock(time.perf_counter() - began)} until here")
    checkpoints = CheckpointFolder(folder, config.run.keep_checkpoints, identity)
    try:
        step, stopped = train(run, data, engine, checkpoints, reporter)
    except TrainingFailure as failure:
        raise TrainingFailure(f"{failure}; {where_to_go_on(checkpoints)}") from failure
    finally:  # also of a run that broke down
        _report(folder, reporter)
    if stopped:
        reporter.line(f"stopped on request after step {step} of {run.last}; continue with --resume {folder}")
    reporter.line(f"{step - run.first} steps done; {clock(time.perf_counter() - began)} in all")


def prepare_run(run: CheckedRun, reporter: Reporter) -> tuple[list[PreparedData], dict[str, Any]]:
    """Return the data of each phase, and what a resumed run must agree with (collective).

    Raises:
        RecipeError: bad data, a checkpoint of other data, a model that does not fit.
    """
    data = [prepare_phase(run.config.data, phase, reporter) for phase in run.phases]
    for prepared, plan in zip(data, run.plans, strict=True):
        for line in prepared.describe(plan.sequences):
            reporter.line(line)
    fingerprints = "+".join(prepared.fingerprint for prepared in data)
    identity = {**early_identity(run), "data": fingerprints, "vocabulary": data[0].vocabulary_size}
    if run.saved_identity is not None and run.invocation.resume is not None:
        check_same_run(run.saved_identity, identity, run.invocation.resume)
    require_memory(run, data[0].vocabulary_size)
    return data, identity


def _report(folder: Path, reporter: Reporter) -> None:
    if not reporter.active:
        return
    try:
        reporter.line(write_report(folder))
    except OSError as error:  # the disk that was too full for a checkpoint may be too full for it
        reporter.line(f"the report could not be written: {error}")


def prepare_phase(config: DataConfig, phase: Phase, reporter: Reporter) -> PreparedData:
    """Return the data packed to the phase's sequence length (collective)."""
    packed = dataclasses.replace(config, sequence_length=phase.sequence_length)
    data = on_each_machine(lambda: prepare(packed, reporter))
    others = collect(data.fingerprint)
    if len(set(others)) > 1:
        raise RecipeError(
            "the machines have prepared different data: files differ, or each has trained a vocabulary of its own, "
            "which does not come out the same twice; prepare once with `python -m trustratio.recipes.prepare`, copy "
            "the folder to every machine and give it as --data, or let TRUSTRATIO_CACHE be a folder that all share"
        )
    return data


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


def build_engine(run: CheckedRun, vocabulary_size: int) -> TrainingEngine:
    """Build model, optimizer and schedule, and wrap them (collective); load the checkpoint to resume, if any."""
    parts = build_parts(run.config, vocabulary_size)
    engine = run.front_end.engine(parts, run.config.training, run.plans[0], run.settings)
    if run.invocation.resume is not None:
        engine.load(run.invocation.resume)
    return engine


def train(
    run: CheckedRun,
    data: Sequence[PreparedData],
    engine: TrainingEngine,
    checkpoints: CheckpointFolder,
    reporter: Reporter,
) -> tuple[int, bool]:
    """Train the phases between run.first and run.last; return the updates done and whether a request stopped it."""
    config = run.config
    shape, vocabulary = config.model, padded_vocabulary(data[0].vocabulary_size)
    step_metrics = StepMetrics(
        engine,
        ModelFlops(shape.layers, shape.hidden, shape.intermediate, vocabulary),
        peak_of(engine.device, config.training.precision, config.run.peak_tflops),
        measures_noise(config, run.plans),
    )
    metrics = MetricLoggers(checkpoints.folder.parent, config.run.loggers, config.to_dict(), active=reporter.active)
    display = reporter.training_bar(run.first, run.last, config.run.print_every)

    def checkpoint(step: int) -> None:
        with step_metrics.not_training():
            path = checkpoints.write(step, engine.save, collect_failures, first=engine.rank == 0)
        reporter.line(f"step {step}: checkpoint {path}")

    step, stopped = run.first, False
    with StopRequests() as stop, contextlib.closing(metrics), contextlib.closing(display):
        for phase, plan, prepared in zip(run.phases, run.plans, data, strict=True):
            if stopped or step >= min(phase.last, run.last):
                continue
            engine.begin_phase(plan)
            if phase.number == 2 and step == phase.first:
                carry_over(engine.optimizer, config.phase_two.keep_moments, config.phase_two.reset_step)
            training_rows, validation_rows = masked_rows(prepared, config)
            loop = TrainingLoop(
                engine=engine,
                training_rows=training_rows,
                validation_batches=validation_rows.validation_batches(
                    plan.micro, engine.rank, engine.ranks, config.data.validation_sequences
                ),
                plan=plan,
                config=config.run,
                seed=config.training.seed,
                unigram_entropy=prepared.unigram_entropy,
                step_metrics=step_metrics,
                metrics=metrics,
                display=display,
                checkpoint=checkpoint,
                stop_requested=lambda: stop.requested,
                phase_first=phase.first,
                sequences_before=phase.sequences_before,
                data_workers=data_workers(config.data, engine.device),
            )
            step, stopped = loop.run(step, min(phase.last, run.last))
    return step, stopped


def masked_rows(data: PreparedData, config: RecipeConfig) -> tuple[MaskedRows, MaskedRows]:
    vocabulary, probability, seed = data.vocabulary(), config.data.mask_probability, config.training.seed
    return (
        MaskedRows(data.rows("train"), vocabulary, probability, seed),
        MaskedRows(data.rows("validation"), vocabulary, probability, seed),
    )


def data_workers(config: DataConfig, device: torch.device) -> int:
    if config.workers is None:
        return default_workers(device, ranks_on_machine())
    return config.workers


def where_to_go_on(checkpoints: CheckpointFolder) -> str:
    newest = checkpoints.newest()
    if newest is None:
        return "there is no earlier checkpoint"
    return f"the last good checkpoint, {newest}, is whole: continue with --resume {newest}"


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


def claim_output(run: CheckedRun) -> Path:
    """Create or reopen the output folder and write the configuration into it; rank 0 only."""
    invocation, config = run.invocation, run.config
    resumed = run_of(invocation.resume) if invocation.resume is not None else None
    if resumed is not None and (invocation.output is None or invocation.output.resolve() == resumed):
        folder = resumed
    elif invocation.output is not None:
        folder = claim_folder(invocation.output, invocation.overwrite)
    else:
        folder = fresh_folder(Path("runs"), config.preset)
    write_json(folder / CONFIG, config.to_dict())
    if run.settings is not None:
        write_json(folder / DEEPSPEED_CONFIG, run.settings)
    write_json(folder / ENVIRONMENT, _environment(run))
    return folder


def _environment(run: CheckedRun) -> dict[str, Any]:
    return {
        **describe_machine(get_accelerator().device_name()),
        "accelerator": get_accelerator().device_name(),
        "ranks": run.plans[0].ranks,
        "micro_batch": run.plans[0].micro,
        "accumulation": run.plans[0].accumulation,
        "first_step": run.first,
        "last_step": run.last,
    }


def _best_precision() -> str:
    # On a CPU bf16 pays off for large models only, and not on every CPU; it stays a choice there.
    on_gpu = get_accelerator().device_name() != "cpu"
    return "bf16" if on_gpu and get_accelerator().is_bf16_supported() else "fp32"


def _quieten() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _shown(value: Any) -> str:
    return str(value).replace(" ", "")
