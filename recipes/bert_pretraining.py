"""Pretrain BERT: resolve and check the configuration, prepare the data, train, report."""

from __future__ import annotations

import dataclasses
import logging
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator

from trustratio.recipes import deepspeed_settings, rank_agreement, recipe_optimizers, run_folder
from trustratio.recipes.global_batch import BatchPlan, plan_batch
from trustratio.recipes.learning_rate_schedules import polynomial_scheduler, resolve_warmup
from trustratio.recipes.masked_language_model import build_model, padded_vocabulary
from trustratio.recipes.packed_sequences import MaskedRows
from trustratio.recipes.prepared_data import PreparedData, prepare
from trustratio.recipes.progress_display import Reporter, clock
from trustratio.recipes.recipe_config import RecipeConfig, check_ranges
from trustratio.recipes.recipe_errors import RecipeError
from trustratio.recipes.recipe_options import Invocation, parse_command_line
from trustratio.recipes.run_plots import draw_report
from trustratio.recipes.stop_requests import StopRequests
from trustratio.recipes.text_documents import expand_sources
from trustratio.recipes.training_engines import DeepSpeedTraining
from trustratio.recipes.training_loop import TrainingLoop

BAD_INPUT = 2
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class CheckedRun:
    """A configuration that passed every check that needs no data.

    Attributes:
        invocation: the command line, with the configuration completed from the DeepSpeed file.
        plan: micro-batch, accumulation and ranks.
        settings: complete DeepSpeed configuration.
        first: updates already done by the checkpoint to resume, else 0.
        last: updates to end at.
        saved_identity: what the checkpoint says a continued run must agree with, else None.
    """

    invocation: Invocation
    plan: BatchPlan
    settings: dict[str, Any]
    first: int
    last: int
    saved_identity: dict[str, Any] | None

    @property
    def config(self) -> RecipeConfig:
        """The resolved configuration."""
        return self.invocation.config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return the process's exit status.

    0: finished, or stopped by Ctrl-C or SIGTERM with a checkpoint written. 2: bad input, with one message on the
    first rank. 130: interrupted before training began.
    """
    reporter = Reporter(active=rank_agreement.rank() == 0)
    try:
        run = check_run(parse_command_line(sys.argv[1:] if arguments is None else arguments))
        announce(run, reporter)
        if not run.invocation.dry_run:
            pretrain(run, reporter)
    except RecipeError as error:
        if reporter.active:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except KeyboardInterrupt:
        if reporter.active:
            print("interrupted before training began; nothing was written", file=sys.stderr, flush=True)
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def check_run(invocation: Invocation) -> CheckedRun:
    """Check everything that can be checked without reading data, and complete the configuration.

    Raises:
        RecipeError: any of the bad input that the recipe knows of.
    """
    file_settings = _file_settings(invocation)
    deepspeed_settings.refuse_unsupported(file_settings)
    config = complete_config(invocation, file_settings)
    invocation = dataclasses.replace(invocation, config=config)
    check_ranges(config)
    recipe_optimizers.check_name(config.optimizer.name)
    training = config.training
    plan = plan_batch(training.global_batch, training.micro_batch, rank_agreement.world_size())
    settings = deepspeed_settings.merge(
        file_settings,
        plan,
        training.zero_stage,
        training.precision,
        training.gradient_clipping,
        elementwise=recipe_optimizers.is_baseline(config.optimizer.name),
    )
    expand_sources(config.data.sources)
    last = min(training.steps, invocation.max_steps or training.steps)
    run = CheckedRun(invocation, plan, settings, first=0, last=last, saved_identity=None)
    if invocation.resume is not None:
        run = _check_resume(run, invocation.resume)
    elif invocation.output is not None and not invocation.overwrite:
        run_folder.require_free(invocation.output)
    return run


def complete_config(invocation: Invocation, file_settings: dict[str, Any]) -> RecipeConfig:
    """Return the configuration with ZeRO stage and precision settled between command line, file and device.

    Raises:
        RecipeError: command line and file contradict each other.
    """
    config = invocation.config
    training = config.training
    for name, in_file in (
        ("zero_stage", deepspeed_settings.stage_of(file_settings)),
        ("precision", deepspeed_settings.precision_of(file_settings)),
    ):
        if in_file is None:
            continue
        if f"training.{name}" in invocation.given and getattr(training, name) not in (in_file, "auto"):
            raise RecipeError(
                f"--{name} {getattr(training, name)} contradicts the DeepSpeed configuration, which has {in_file}; "
                "give it in one place"
            )
        training = dataclasses.replace(training, **{name: in_file})
    if training.precision == "auto":
        training = dataclasses.replace(training, precision=_best_precision())
    return dataclasses.replace(config, training=training)


def announce(run: CheckedRun, reporter: Reporter) -> None:
    """Print the resolved configuration and the batch line."""
    reporter.line(f"preset {run.config.preset}, resolved configuration:")
    for section, fields in run.config.to_dict().items():
        if section != "preset":
            reporter.line("  " + " ".join(f"{section}.{name}={_shown(value)}" for name, value in fields.items()))
    reporter.line(run.plan.describe(run.config.data.sequence_length))


def pretrain(run: CheckedRun, reporter: Reporter) -> None:
    """Prepare the data, train from run.first to run.last and draw the report (all ranks).

    Raises:
        RecipeError: bad data, a checkpoint of other data, an output folder in use, refused optimizer options.
    """
    began = time.perf_counter()
    _quieten()
    rank_agreement.start()
    config = run.config
    data = rank_agreement.on_each_machine(lambda: prepare(config.data, reporter))
    for line in data.describe(run.plan.sequences):
        reporter.line(line)
    identity = {**early_identity(run), "data": data.fingerprint, "vocabulary": data.vocabulary_size}
    if run.saved_identity is not None and run.invocation.resume is not None:
        run_folder.check_same_run(run.saved_identity, identity, run.invocation.resume)
    # One folder for all ranks; claimed only now, so that bad data leave no empty run behind.
    engine = build_engine(run, data)
    folder = rank_agreement.on_first_rank(lambda: _claim_output(run))
    reporter.line(f"output folder: {folder}; {clock(time.perf_counter() - began)} until here")
    step, stopped = train(run, data, engine, folder, identity, reporter)
    if reporter.active:
        draw_report(
            run_folder.read_metrics(folder),
            f"{config.preset}: BERT {config.model.layers} x {config.model.hidden}, {config.optimizer.name}, "
            f"{run.plan.sequences:,} sequences of {config.data.sequence_length} per step, ZeRO-"
            f"{config.training.zero_stage}, ranks: {run.plan.ranks}",
            data.unigram_entropy,
            folder / run_folder.REPORT,
        )
    reporter.line(f"report: {folder / run_folder.REPORT}; metrics: {folder / run_folder.METRICS}")
    if stopped:
        reporter.line(f"stopped on request after step {step} of {run.last}; continue with --resume {folder}")
    reporter.line(f"{step - run.first} steps done; {clock(time.perf_counter() - began)} in all")


def build_engine(run: CheckedRun, data: PreparedData) -> DeepSpeedTraining:
    """Build model, optimizer and schedule, and wrap them (collective); load the checkpoint to resume, if any."""
    config = run.config
    torch.manual_seed(config.training.seed)
    model = build_model(config.model, padded_vocabulary(data.vocabulary_size))
    optimizer = recipe_optimizers.build_optimizer(config.optimizer, model)
    steps = config.training.steps
    scheduler = polynomial_scheduler(
        resolve_warmup(config.schedule.warmup, steps), steps, config.schedule.degree, config.schedule.final
    )
    engine = DeepSpeedTraining(model, optimizer, scheduler, run.settings)
    if run.invocation.resume is not None:
        engine.load(run.invocation.resume)
    return engine


def train(
    run: CheckedRun,
    data: PreparedData,
    engine: DeepSpeedTraining,
    folder: Path,
    identity: dict[str, Any],
    reporter: Reporter,
) -> tuple[int, bool]:
    """Run the training loop; return the updates done and whether a request stopped it early."""
    config = run.config
    vocabulary, probability, seed = data.vocabulary(), config.data.mask_probability, config.training.seed
    training_rows = MaskedRows(data.rows("train"), vocabulary, probability, seed)
    validation_rows = MaskedRows(data.rows("validation"), vocabulary, probability, seed)
    checkpoints = run_folder.CheckpointFolder(folder, config.run.keep_checkpoints, identity)
    metrics = run_folder.MetricsLog(folder, active=reporter.active)
    display = reporter.training_bar(run.first, run.last, config.run.print_every)

    def checkpoint(step: int) -> None:
        path = checkpoints.write(step, engine.save, engine.barrier, first=engine.rank == 0)
        reporter.line(f"step {step}: checkpoint {path}")

    with StopRequests() as stop:
        loop = TrainingLoop(
            engine=engine,
            training_rows=training_rows,
            validation_batches=validation_rows.validation_batches(
                run.plan.micro, engine.rank, engine.ranks, config.data.validation_sequences
            ),
            plan=run.plan,
            config=config.run,
            seed=seed,
            unigram_entropy=data.unigram_entropy,
            metrics=metrics,
            display=display,
            checkpoint=checkpoint,
            stop_requested=lambda: stop.requested,
        )
        result = loop.run(run.first, run.last)
        display.close()
        metrics.close()
    return result


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
        "seed": training.seed,
        "precision": training.precision,
        "zero_stage": training.zero_stage,
        "ranks": run.plan.ranks,
        "deepspeed": deepspeed_settings.without_batch_sizes(run.settings),
    }


def _file_settings(invocation: Invocation) -> dict[str, Any]:
    """Return the DeepSpeed settings given by file; a resumed run that is given none keeps those it was started with."""
    if invocation.deepspeed_config is not None:
        return deepspeed_settings.load_file(invocation.deepspeed_config)
    if invocation.resume is not None:
        saved = run_folder.run_of(invocation.resume) / run_folder.DEEPSPEED_CONFIG
        return deepspeed_settings.without_batch_sizes(deepspeed_settings.load_file(str(saved)))
    return {}


def _check_resume(run: CheckedRun, checkpoint: Path) -> CheckedRun:
    description = run_folder.describe_checkpoint(checkpoint)
    run = dataclasses.replace(run, first=description["step"], saved_identity=description["identity"])
    run_folder.check_same_run(description["identity"], early_identity(run), checkpoint)
    if run.first >= run.last:
        raise RecipeError(
            f"{checkpoint} is at step {run.first} and the run ends at step {run.last}: nothing is left to do; "
            "raise --steps or --max_steps"
        )
    output = run.invocation.output
    if output is not None and output.resolve() != run_folder.run_of(checkpoint) and not run.invocation.overwrite:
        run_folder.require_free(output)
    if output is None or output.resolve() == run_folder.run_of(checkpoint):
        run_folder.require_newest(checkpoint, run.invocation.overwrite)
    return run


def _claim_output(run: CheckedRun) -> Path:
    """Create or reopen the output folder and write the configuration into it; rank 0 only."""
    invocation, config = run.invocation, run.config
    resumed = run_folder.run_of(invocation.resume) if invocation.resume is not None else None
    if resumed is not None and (invocation.output is None or invocation.output.resolve() == resumed):
        folder = resumed
    elif invocation.output is not None:
        folder = run_folder.claim_folder(invocation.output, invocation.overwrite)
    else:
        folder = run_folder.fresh_folder(Path("runs"), config.preset)
    run_folder.write_json(folder / run_folder.CONFIG, config.to_dict())
    run_folder.write_json(folder / run_folder.DEEPSPEED_CONFIG, run.settings)
    run_folder.write_json(folder / run_folder.ENVIRONMENT, _environment(run))
    return folder


def _environment(run: CheckedRun) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "accelerator": get_accelerator().device_name(),
        "ranks": run.plan.ranks,
        "micro_batch": run.plan.micro,
        "accumulation": run.plan.accumulation,
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
