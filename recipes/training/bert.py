"""Pretrain BERT with the recipe's own loop, wrapped as the launcher says: prepare the data, train, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.progress import PROGRESS
from ..common.reporter import Reporter
from ..configuration.phases import carry_over
from ..data.prepared import PreparedData
from ..model.build import build_parts
from ..runs.checkpoints import CheckpointFolder
from .batches import Batches, batches_of
from .checks import CheckedRun, check_run
from .engines import TrainingEngine
from .launchers import Launcher
from .loop import TrainingLoop
from .phase_data import phases_with_data
from .ranks import collect_failures, share_of_all
from .records import open_records
from .session import (
    announce_end,
    open_output,
    prepare_run,
    reported,
    run_command,
    special_tokens_of,
    vocabulary_rows_of,
)
from .step_metrics import StepMetrics
from .stop_requests import StopRequests


def main(arguments: Sequence[str] | None = None, launcher: Launcher | None = None) -> int:
    """Pretrain; return the process's exit status, see `run_command`.

    Args:
        arguments: the command line without the program's name; None: this process's.
        launcher: what wraps the model; None: DeepSpeed's.
    """
    return run_command(arguments, lambda invocation: check_run(invocation, launcher), pretrain)


def pretrain(run: CheckedRun, reporter: Reporter) -> int:
    """Prepare the data, train from run.first to run.last and draw the report (all ranks).

    Returns:
        The exit status, see `announce_end`.

    Raises:
        RecipeError: bad data, a checkpoint of other data, an output folder in use, refused optimizer options.
        TrainingFailure: training could not go on; the report is drawn, and the message names the last good checkpoint.
    """
    data, identity = prepare_run(run, reporter)
    with reporter.stages("engine"):
        engine = build_engine(run, data[0])
    folder, checkpoints = open_output(run, identity, reporter)
    # To the very end: a launcher that is gone asks ranks to stop once more, while the first one draws the report.
    with StopRequests(reporter.active) as stop:
        with reported(folder, checkpoints, reporter), reporter.stages("steps"):
            batches = train(run, data, engine, folder, checkpoints, reporter, stop)
        return announce_end(run, batches, folder, stop, reporter)


def build_engine(run: CheckedRun, data: PreparedData) -> TrainingEngine:
    """Build model, optimizer and schedule, and wrap them (collective); load the checkpoint to resume, if any."""
    PROGRESS.begin("while building the model")
    rows = vocabulary_rows_of(run, data)
    parts = build_parts(run.config, data.vocabulary_size, special_tokens_of(run, data), rows)
    engine = run.launcher.engine(parts, run.config.training, run.plans[0], run.settings)
    if run.invocation.resume is not None:
        engine.load(run.invocation.resume)
    return engine


def train(
    run: CheckedRun,
    data: Sequence[PreparedData],
    engine: TrainingEngine,
    folder: Path,
    checkpoints: CheckpointFolder,
    reporter: Reporter,
    stop: StopRequests,
) -> Batches:
    """Train the phases between run.first and run.last (collective).

    Returns:
        Where the run is: not at its end if a request to stop ended it.
    """
    config, resume = run.config, run.invocation.resume
    batches = batches_of(run)
    step_metrics = StepMetrics.of_run(engine, config, run.plans, vocabulary_rows_of(run, data[0]))

    if resume is not None:
        step_metrics.load(resume)

    def save(folder: Path) -> None:
        engine.save(folder, for_any_ranks=config.run.for_any_ranks)
        step_metrics.save(folder)
        batches.save(folder, engine)

    def checkpoint(step: int) -> None:
        path = checkpoints.write(step, save, collect_failures, engine.rank == 0, share_of_all())
        reporter.line(f"step {step}: checkpoint {path}")

    stopped = False
    with open_records(run, folder, reporter) as records:
        phases = phases_with_data(run, data, engine.device)
        while not (stopped or batches.is_over):
            batches.enter_phase()
            engine.begin_phase(batches.phase)
            phase_data = phases[batches.phase.number - 1]
            if batches.at_border:
                carry_over(engine.optimizer, config.phase_two.keep_moments, config.phase_two.reset_step)
            loop = TrainingLoop(
                engine=engine,
                batches=batches,
                data=phase_data,
                config=config.run,
                seed=config.training.seed,
                step_metrics=step_metrics,
                records=records,
                checkpoint=checkpoint,
                stop_requested=lambda: stop.requested,
            )
            stopped = loop.run()
    return batches
