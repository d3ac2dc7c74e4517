"""Pretrain BERT: resolve and check the configuration, prepare the data, train, report."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence

from ..common.errors import TrainingFailure
from ..common.reporter import Reporter, clock
from ..configuration.phases import carry_over
from ..data.prepared import PreparedData
from ..model.build import build_parts
from ..model.flops import ModelFlops, peak_of
from ..model.masked_language_model import padded_vocabulary
from ..runs.checkpoints import CheckpointFolder
from ..runs.loggers import MetricLoggers
from .checks import CheckedRun, check_run
from .engines import TrainingEngine
from .launchers import DeepSpeedFrontEnd, FrontEnd
from .loop import TrainingLoop
from .ranks import (
    collect_failures,
    on_first_rank,
    start,
)
from .session import _report, claim_output, data_workers, masked_rows, prepare_run, run_command, where_to_go_on
from .step_metrics import StepMetrics, measures_noise
from .stop_requests import StopRequests


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


def _quieten() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
