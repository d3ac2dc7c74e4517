"""What surrounds training, whichever loop trains: exit status and errors, data, output folder, report."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..common.errors import BAD_INPUT, FAILED, INTERRUPTED, NothingToDo, RecipeError, TrainingFailure, sentence
from ..common.files import write_json, write_sealed
from ..common.machine import describe_machine
from ..common.reporter import Reporter, clock, folded
from ..configuration.command_line import Invocation, parse_command_line
from ..configuration.config import DataConfig, RecipeConfig
from ..configuration.phases import Phase, describe_plan
from ..configuration.presets import PRESETS, list_presets
from ..data.preparation import mended, prepare
from ..data.prepared import PreparedData
from ..data.verification import damaged_files, expected_hashes
from ..runs.checkpoints import RANKS, CheckpointFolder, check_same_run, require_whole, run_of
from ..runs.folder import CONFIG, DEEPSPEED_CONFIG, ENVIRONMENT, RUNS, claim_folder, fresh_folder, hold, let_go
from ..runs.report import write_report
from .checks import CheckedRun, early_identity, require_memory
from .deepspeed_settings import describe_sums
from .other_ranks import is_read
from .quiet import quieten
from .ranks import (
    LauncherError,
    collect,
    on_each_machine,
    on_first_rank,
    rank,
    share_of_all,
    share_of_machine,
    world_size,
)


def run_command(
    arguments: Sequence[str] | None,
    check: Callable[[Invocation], CheckedRun],
    train: Callable[[CheckedRun, Reporter], None],
) -> int:
    """Read the command line, `check` it, announce the run and `train` it.

    Args:
        arguments: the command line without the program's name; None: this process's.
        check: what can be checked before any work is done.
        train: everything from the data to the report.

    Returns:
        The process's exit status. 0: finished, now or before, or stopped by Ctrl-C or SIGTERM with a checkpoint
        written. 2: bad input, with one message on the first rank. 3: training could not go on (the loss became NaN, a
        checkpoint could not be written); the report is drawn and the last good checkpoint named. 130: interrupted
        before training began.
    """
    reporter = Reporter()
    try:
        reporter = Reporter(active=rank() == 0)
        quieten()
        invocation = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        if invocation.list_presets:
            for line in list_presets():
                reporter.line(line)
            return 0
        run = check(invocation)
        announce(run, reporter)
        if not invocation.dry_run:
            train(run, reporter)
    except NothingToDo as done:
        reporter.line(str(done))
        return 0
    except LauncherError as error:  # of this rank, which may be the only one that has it
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except (RecipeError, TrainingFailure) as error:
        reporter.error(f"error: {error}")
        return FAILED if isinstance(error, TrainingFailure) else BAD_INPUT
    except OSError as error:  # on this rank alone, which the others do not know: so it speaks, whichever it is
        print(f"error: rank {rank()}: {sentence(error)}", file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        reporter.error("interrupted before training began; nothing was written")
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def announce(run: CheckedRun, reporter: Reporter) -> None:
    """Print what is special about the configuration, or with --verbose all of it, and the plan of the phases."""
    for line in _configuration(run):
        reporter.line(line)
    for line in describe_plan(run.config, world_size()):
        reporter.line(line)
    training, accumulation = run.config.training, max(plan.accumulation for plan in run.plans)
    for line in describe_sums(run.settings, training.precision, training.zero_stage, accumulation):
        reporter.line(folded(line))


def _configuration(run: CheckedRun) -> Iterator[str]:
    """Yield the configuration: all of it, or what the command line set or the preset has otherwise."""
    config, invocation = run.config, run.invocation
    known = PRESETS.get(config.preset)
    yield folded(f"preset {config.preset}: {known.description}" if known else f"preset {config.preset}")
    usual = known.config.to_dict() if known else RecipeConfig().to_dict()
    shown = []
    for section, fields in config.to_dict().items():
        if section == "preset":
            continue
        for name, value in fields.items():
            changed = value != usual[section][name] or f"{section}.{name}" in invocation.given
            if changed or invocation.verbose:
                shown.append(f"{section}.{name}={_shown(value)}")
    if shown:
        yield folded(f"{'resolved' if invocation.verbose else 'besides'}: {' '.join(shown)}")
    if not invocation.verbose:
        yield f"everything else: --verbose, or {CONFIG} in the output folder"


def _shown(value: Any) -> str:
    return str(value).replace(" ", "")


def prepare_run(run: CheckedRun, reporter: Reporter) -> tuple[list[PreparedData], dict[str, Any]]:
    """Return the data of each phase, and what a resumed run must agree with (collective).

    Raises:
        RecipeError: a damaged checkpoint, bad data, a checkpoint of other data, a model that does not fit.
    """
    resume = run.invocation.resume
    if resume is not None:
        saved = (run.saved_identity or {}).get(RANKS)
        require_whole(resume, is_read(resume, saved, world_size()), share_of_all())
    data = [_prepare_phase(run.config.data, phase, reporter) for phase in run.phases]
    for prepared, plan in zip(data, run.plans, strict=True):
        for line in prepared.describe(plan.sequences):
            reporter.line(folded(line))
    fingerprints = "+".join(prepared.fingerprint for prepared in data)
    identity = {**early_identity(run), "data": fingerprints, "vocabulary": data[0].vocabulary_size}
    if run.saved_identity is not None and resume is not None:
        check_same_run(run.saved_identity, identity, resume)
    require_memory(run, data[0].vocabulary_size)
    return data, identity


def _prepare_phase(config: DataConfig, phase: Phase, reporter: Reporter) -> PreparedData:
    """Return the data packed to the phase's sequence length (collective)."""
    packed = dataclasses.replace(config, sequence_length=phase.sequence_length)
    data = on_each_machine(lambda: prepare(packed, reporter))
    if config.verify and phase.number == 1:  # a second phase reads the same files
        data = _verified(packed, data, reporter)
    if len(set(collect(data.fingerprint))) > 1:
        raise RecipeError(
            "the machines have prepared different data: files differ, or each has trained a vocabulary of its own, "
            "which does not come out the same twice; prepare once with `python -m trustratio.recipes.prepare`, copy "
            "the folder to every machine and give it as --data, or let TRUSTRATIO_CACHE be a folder that all share"
        )
    return data


def _verified(config: DataConfig, data: PreparedData, reporter: Reporter) -> PreparedData:
    """Return data whose files hold what was written, to the last byte (collective).

    The ranks of a machine share the reading of its files.

    Raises:
        RecipeError: files of a prepared folder do not. Those in the cache are written anew.
    """
    folder = Path(data.folder)
    expected = on_each_machine(lambda: expected_hashes(folder))
    damaged = damaged_files(folder, expected, share_of_machine())
    return on_each_machine(lambda: mended(config, data, damaged, reporter))


def open_output(
    run: CheckedRun, identity: dict[str, Any], reporter: Reporter, began: float
) -> tuple[Path, CheckpointFolder]:
    """Create or reopen the output folder, one for all ranks; return it and its checkpoints (collective).

    Called once nothing but training can fail, so that bad data leave no empty run behind.

    Args:
        run: that will write into it.
        identity: what a run that continues this one must agree with.
        reporter: says which folder it is.
        began: when the run began, by `time.perf_counter`.

    Raises:
        RecipeError: the folder is in use, or cannot be created.
    """
    folder = on_first_rank(lambda: _claim_output(run))
    reporter.line(f"output folder: {folder}; {clock(time.perf_counter() - began)} until here")
    return folder, CheckpointFolder(folder, run.config.run.keep_checkpoints, identity)


def _claim_output(run: CheckedRun) -> Path:
    """Create or reopen the output folder and write the configuration into it; rank 0 only."""
    invocation, config = run.invocation, run.config
    resumed = run_of(invocation.resume) if invocation.resume is not None else None
    if resumed is not None and (invocation.output is None or invocation.output.resolve() == resumed):
        folder = resumed
        hold(folder)
    elif invocation.output is not None:
        folder = claim_folder(invocation.output, invocation.overwrite)
    else:
        folder = fresh_folder(RUNS, config.preset)
        hold(folder)
    write_sealed(folder / CONFIG, config.to_dict())
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


@contextlib.contextmanager
def reported(folder: Path, checkpoints: CheckpointFolder, reporter: Reporter) -> Iterator[None]:
    """Train in the block; afterwards the report is drawn into the run's folder, also if training broke down.

    Raises:
        TrainingFailure: that of the block, with the last good checkpoint added.
    """
    try:
        yield
    except TrainingFailure as failure:
        raise TrainingFailure(f"{failure}; {_where_to_go_on(checkpoints)}") from failure
    finally:
        if reporter.active:
            _report(folder, reporter)
        let_go(folder)


def _where_to_go_on(checkpoints: CheckpointFolder) -> str:
    newest = checkpoints.newest()
    if newest is None:
        return "there is no earlier checkpoint"
    return f"the last good checkpoint, {newest}, is whole: continue with --resume {newest}"


def _report(folder: Path, reporter: Reporter) -> None:
    try:
        reporter.line(write_report(folder))
    except OSError as error:  # the disk that was too full for a checkpoint may be too full for it
        reporter.line(f"the report could not be written: {error}")


def announce_end(run: CheckedRun, step: int, folder: Path, reporter: Reporter, began: float) -> None:
    """Print how many updates were done, and how to go on if a request to stop came before the last one.

    Args:
        run: that was trained.
        step: updates done in all.
        folder: of the run.
        reporter: prints.
        began: when the run began, by `time.perf_counter`.
    """
    if step < run.last:
        reporter.line(f"stopped on request after step {step} of {run.last}; continue with --resume {folder}")
    reporter.line(f"{step - run.first} steps done; {clock(time.perf_counter() - began)} in all")
