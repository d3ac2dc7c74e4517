"""Pretrain BERT with the Trainer's loop in place of the recipe's own; what it leaves is also a model to load."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from ..common.errors import RecipeError, TrainingFailure
from ..common.files import WRITING, finish_folder
from ..common.marks import write_checksums
from ..common.progress import PROGRESS
from ..common.reporter import Reporter
from ..configuration.command_line import Invocation
from ..data.prepared import PreparedData
from ..model.build import RecipeParts, build_parts
from ..runs.checkpoints import CheckpointFolder
from ..runs.folder import MODEL
from .checks import CheckedRun, check_run
from .export import save_tokenizer, takes_token_types
from .launchers import launcher_of_this_process
from .model_card import write_card
from .ranks import collect_failures
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
from .stop_requests import StopRequests
from .trainer import RecipeTrainer, save_weights, trainers_part
from .unpickling import tensors_only


def main(arguments: Sequence[str] | None = None) -> int:
    """Pretrain; return the process's exit status, see `run_command`."""
    return run_command(arguments, check_trainer_run, pretrain)


def check_trainer_run(invocation: Invocation) -> CheckedRun:
    """Check what `check_run` checks, for the launcher that started this process.

    Raises:
        RecipeError: any bad input; a checkpoint that the Trainer did not write.
    """
    if invocation.resume is not None:
        trainers_part(invocation.resume)
    return check_run(invocation, launcher_of_this_process())


def pretrain(run: CheckedRun, reporter: Reporter) -> int:
    """Prepare the data, train with the Trainer, save the model in transformers' format and draw the report (all ranks).

    Returns:
        The exit status, see `announce_end`.

    Raises:
        RecipeError: bad data, a checkpoint of other data or versions, an output folder in use, refused options.
        TrainingFailure: training could not go on; the report is drawn, and the message names the last good checkpoint.
    """
    data, identity = prepare_run(run, reporter)
    PROGRESS.begin("while building the model")
    rows = vocabulary_rows_of(run, data[0])
    parts = build_parts(run.config, data[0].vocabulary_size, special_tokens_of(run, data[0]), rows)
    folder, checkpoints = open_output(run, identity, reporter)
    # To the very end: a launcher that is gone asks ranks to stop once more, while the first one draws the report.
    with StopRequests(reporter.active) as stop:
        with reported(folder, checkpoints, reporter), reporter.stages("steps"):
            trainer = _train(run, data, parts, folder, checkpoints, stop, reporter)
            _save_model(trainer, folder, data[0])
        return announce_end(run, trainer.batches, folder, stop, reporter)


def _train(
    run: CheckedRun,
    data: Sequence[PreparedData],
    parts: RecipeParts,
    folder: Path,
    checkpoints: CheckpointFolder,
    stop: StopRequests,
    reporter: Reporter,
) -> RecipeTrainer:
    """Train from run.first to run.last (collective); return the Trainer."""
    resume = run.invocation.resume
    with open_records(run, folder, reporter) as records:
        with reporter.stages("engine"):
            trainer = RecipeTrainer(run, data, parts, checkpoints, records, stop)
        with contextlib.ExitStack() as stack:
            stack.callback(trainer.close_feed)
            if resume is not None:
                stack.enter_context(tensors_only(resume))
            trainer.train(None if resume is None else str(trainers_part(resume)))
        trainer.require_data()
        records.require_written()
    return trainer


def _save_model(trainer: RecipeTrainer, folder: Path, data: PreparedData) -> None:
    """Write the model in transformers' format with its tokenizer into the run's folder `MODEL` (collective).

    Raises:
        TrainingFailure: they could not be written; the last checkpoint has all of them.
    """
    PROGRESS.begin("while writing the model")
    failure = None
    unfinished = folder / (WRITING + MODEL)
    try:
        save_weights(trainer, unfinished)
        if trainer.args.should_save:
            save_tokenizer(
                data, trainer.run.config.model.max_positions, unfinished, takes_token_types(trainer.parts.model)
            )
            write_checksums(unfinished)
            write_card(folder, trainer.batches.step, unfinished)
            finish_folder(unfinished, folder / MODEL)
    except (OSError, SafetensorError, RecipeError) as error:
        failure = error
    failures = collect_failures(failure)
    if failures:
        raise TrainingFailure(f"the model could not be written ({'; '.join(failures)}); the last checkpoint has it")
