"""What surrounds training, whichever loop trains: exit status and errors, data, output folder, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..common.errors import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    STOPPED,
    NothingToDo,
    RecipeError,
    TrainingFailure,
    sentence,
)
from ..common.files import remove_unfinished, write_json, write_sealed
from ..common.machine import describe_machine
from ..common.progress import PROGRESS
from ..common.reporter import Reporter, clock, folded
from ..common.stages import cpu_seconds
from ..configuration.batch_growth import describe_growth, growths_of
from ..configuration.command_line import Invocation, parse_command_line
from ..configuration.config import DataConfig, RecipeConfig
from ..configuration.phases import Phase, describe_plan
from ..configuration.presets import PRESETS, list_presets
from ..data.preparation import mended, prepare
from ..data.prepared import PreparedData
from ..data.verification import damaged_files, expected_hashes
from ..model.attention import describe_attention
from ..model.masked_language_model import first_rows, rows_of_checkpoint
from ..model.sixteen_bits import describe_conversion, describe_storage
from ..runs.checkpoints import (
    PADDING,
    RANKS,
    ROWS,
    STATE_DTYPE,
    CheckpointFolder,
    check_same_run,
    drop_checkpoints_after,
    require_newest,
    require_whole,
    run_of,
)
from ..runs.folder import (
    CONFIG,
    DEEPSPEED_CONFIG,
    ENDED,
    ENVIRONMENT,
    RUNS,
    claim_folder,
    fresh_folder,
    hold,
    let_go,
    mark_ended,
)
from ..runs.metrics import drop_records_after
from .batches import Batches
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
    start,
    world_size,
)
from .stop_requests import StopRequests
from .watchdog import RankFailure, Watchdog, leave


def run_command(
    arguments: Sequence[str] | None,
    check: Callable[[Invocation], CheckedRun],
    train: Callable[[CheckedRun, Reporter], int],
) -> int:
    """Read the command line, `check` it, announce the run and `train` it.

    Args:
        arguments: the command line without the program's name; None: this process's.
        check: what can be checked before any work is done.
        train: everything from the data to the report; returns 0, or STOPPED.

    Returns:
        The process's exit status. 0: finished, now or before, or stopped by Ctrl-C or SIGTERM with a checkpoint
        written. 2: bad input, with one message on the first rank. 3: training could not go on (the loss became NaN, a
        checkpoint could not be written); the report is drawn and the last good checkpoint named. 130: interrupted
        before training began. 138: stopped by SIGUSR1, with a checkpoint.
    """
    reporter = Reporter()
    try:
        reporter = Reporter(active=rank() == 0)
        if arguments is None:  # this process is the command
            reporter.stages.add_start()
        quieten()
        invocation = parse_command_line(arguments, reporter.line)
        if invocation.list_presets:
            for line in list_presets():
                reporter.line(line)
            return 0
        with reporter.stages("checks"):
            run = check(invocation)
        announce(run, reporter)
        if not invocation.dry_run:
            with Watchdog(rank(), world_size(), run.config.run.hang_seconds) as watchdog:
                with reporter.stages("joining"):
                    start()
                watchdog.meet()
                return train(run, reporter)
    except NothingToDo as done:
        reporter.line(str(done))
        return 0
    except LauncherError as error:  # of this rank, which may be the only one that has it
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except (RecipeError, TrainingFailure) as error:
        reporter.error(f"error: {error}")
        return FAILED if isinstance(error, TrainingFailure) else BAD_INPUT
    except OSError as error:  # before the ranks have met, on this one alone
        print(f"error: rank {rank()}: {sentence(error)}", file=sys.stderr, flush=True)
        return FAILED
    except RankFailure as failure:  # of one rank, which speaks, whichever it is; the others end with it
        failure.say()
        if world_size() > 1:
            watchdog.let_hear()
            leave(failure.status)
        return failure.status
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
    describe = describe_growth if growths_of(run.config) else describe_plan
    for line in describe(run.config, world_size()):
        reporter.line(line)
    for line in _numbers(run):
        reporter.line(folded(line))


def _numbers(run: CheckedRun) -> Iterator[str]:
    """Yield the lines that say what attention is computed by, and with how many bits numbers are kept."""
    training, saved = run.config.training, run.saved_identity
    yield describe_attention(run.config)
    yield describe_storage(training, run.settings is not None)
    if saved is not None:
        yield from describe_conversion(saved.get(STATE_DTYPE), training.state_dtype)
    yield from describe_sums(
        run.settings, training.precision, training.zero_stage, run.most_accumulation, training.master
    )


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
    _require_one_beginning(resume)
    if resume is not None:
        PROGRESS.begin("while checking the checkpoint")
        saved = (run.saved_identity or {}).get(RANKS)
        require_whole(resume, is_read(resume, saved, world_size()), share_of_all())
    with reporter.stages("data"):
        data = [_prepare_phase(run.config.data, phase, reporter) for phase in run.phases]
    for prepared, plan in zip(data, run.plans, strict=True):
        for line in prepared.describe(plan.sequences):
            reporter.line(folded(line))
    fingerprints = "+".join(prepared.fingerprint for prepared in data)
    identity = {**early_identity(run), "data": fingerprints, "vocabulary": data[0].vocabulary_size}
    if run.saved_identity is not None and resume is not None:
        check_same_run(run.saved_identity, identity, resume)
    identity[PADDING] = _padding(run, data[0], reporter)
    identity[ROWS] = vocabulary_rows_of(run, data[0])
    require_memory(run, data[0].vocabulary_size)
    return data, identity


def special_tokens_of(run: CheckedRun, data: PreparedData) -> dict[str, int | None]:
    """Return the ids of the data's special tokens, with the padding of the model that a resumed run goes on with.

    Earlier releases took 0 for BERT's, whatever the tokenizer has there, and wrote nothing of it into checkpoints.
    """
    tokens, saved = data.special_tokens(), run.saved_identity
    if saved is None or run.config.model.architecture != "bert":
        return tokens
    return {**tokens, "pad": saved.get(PADDING, 0)}


def vocabulary_rows_of(run: CheckedRun, data: PreparedData) -> int:
    """Return the rows of the embedding table, of a resumed run those that it began with."""
    if run.saved_identity is None:
        return first_rows(run.config.model, data.vocabulary_size)
    return rows_of_checkpoint(run.saved_identity, data.vocabulary_size)


def _padding(run: CheckedRun, data: PreparedData, reporter: Reporter) -> int | None:
    padding, own = special_tokens_of(run, data)["pad"], data.special_tokens()["pad"]
    if own is None:
        reporter.line("warning: the tokenizer has no [PAD]; fine_tune.py, which needs one, will refuse the model")
    if padding != own:
        reporter.line(f"padding: token {padding} as in the checkpoint, which an earlier release began, and not {own}")
    return padding


def _require_one_beginning(resume: Path | None) -> None:
    """Check that all ranks have found the same checkpoint to go on from, or none (collective).

    Raises:
        RecipeError: somebody wrote or removed one while they started, or they see different disks.
    """
    found = collect(None if resume is None else resume.name)
    if len(set(found)) > 1:
        shown = ", ".join(f"rank {number}: {name or 'none'}" for number, name in enumerate(found))
        raise RecipeError(
            f"the ranks have found different checkpoints to go on from ({shown}): another run wrote into the folder, "
            "or the machines do not see the same one; start again"
        )


def _prepare_phase(config: DataConfig, phase: Phase, reporter: Reporter) -> PreparedData:
    """Return the data packed to the phase's sequence length (collective)."""
    PROGRESS.begin("while preparing the data")
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


def open_output(run: CheckedRun, identity: dict[str, Any], reporter: Reporter) -> tuple[Path, CheckpointFolder]:
    """Create or reopen the output folder, one for all ranks; return it and its checkpoints (collective).

    Called once nothing but training can fail, so that bad data leave no empty run behind.

    Args:
        run: that will write into it.
        identity: what a run that continues this one must agree with.
        reporter: says which folder it is, and where a run goes on.

    Raises:
        RecipeError: the folder is in use, or cannot be created.
    """
    folder = on_first_rank(lambda: _claim_output(run))
    reporter.line(f"output folder: {folder}; {clock(reporter.stages.seconds())} until here")
    if run.first:
        last = "" if run.config.run.batch_from_noise else f" of {run.last}"
        reporter.line(f"going on from {run.invocation.resume}, after step {run.first}{last}")
    return folder, CheckpointFolder(folder, run.config.run.keep_checkpoints, identity)


def _claim_output(run: CheckedRun) -> Path:
    """Create or reopen the output folder and write the configuration into it; rank 0 only."""
    invocation, config = run.invocation, run.config
    resumed = run_of(invocation.resume) if invocation.resume is not None else None
    if resumed is not None and (invocation.output is None or invocation.output.resolve() == resumed):
        folder = resumed
        hold(folder)
        _cut_back(folder, run)
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


def _cut_back(folder: Path, run: CheckedRun) -> None:
    """Remove from a run that is continued what comes after its checkpoint, and what killed processes had begun."""
    assert run.invocation.resume is not None
    require_newest(run.invocation.resume, run.invocation.overwrite)  # still, now that nobody else writes
    remove_unfinished(folder)
    drop_checkpoints_after(folder, run.first)
    drop_records_after(folder, run.first)


def _environment(run: CheckedRun) -> dict[str, Any]:
    return {
        **describe_machine(get_accelerator().device_name()),
        "accelerator": get_accelerator().device_name(),
        "ranks": run.plans[0].ranks,
        "micro_batch": run.plans[0].micro,
        "accumulation": run.plans[0].accumulation,
        "first_step": run.first,
        **_end_of(run),
        ENDED: None,
    }


def _end_of(run: CheckedRun) -> dict[str, int | None]:
    """Return after which update the run ends; where batches grow, after how many sequences, or updates if so asked."""
    if not run.config.run.batch_from_noise:
        return {"last_step": run.last}
    return {"last_step": run.invocation.max_steps, "last_sequences": sum(phase.sequences for phase in run.phases)}


@contextlib.contextmanager
def reported(folder: Path, checkpoints: CheckpointFolder, reporter: Reporter) -> Iterator[None]:
    """Train in the block; afterwards the report is drawn into the run's folder, also if training broke down.

    If it did not, the folder is marked as that of a run that has ended.

    Raises:
        TrainingFailure: that of the block, with the last good checkpoint added.
    """
    trained = False
    PROGRESS.where_to_go_on = lambda: _where_to_go_on(checkpoints)
    try:
        yield
        trained = True
    except TrainingFailure as failure:
        raise TrainingFailure(f"{failure}; {_where_to_go_on(checkpoints)}") from failure
    finally:
        if reporter.active:
            with reporter.stages("report"):
                _report(folder, checkpoints.newest() if trained else None, reporter)
            _keep_stages(folder, reporter)
        let_go(folder)


def _where_to_go_on(checkpoints: CheckpointFolder) -> str:
    newest = checkpoints.newest()
    if newest is None:
        return "there is no earlier checkpoint"
    return f"the last good checkpoint, {newest}, is whole: continue with --resume {newest}"


def _report(folder: Path, ended_at: Path | None, reporter: Reporter) -> None:
    PROGRESS.alone = True
    # The disk that was too full for a checkpoint may be too full for a report. After training broke down nothing that
    # the report lacks may hide what broke it: out of memory, not even the import succeeds.
    harmless = OSError if ended_at is not None else Exception
    try:
        from ..runs.report import write_report  # takes a second, for matplotlib, that nobody should wait for earlier

        reporter.line(write_report(folder))
        if ended_at is not None:
            mark_ended(folder, ended_at.name)
    except harmless as error:
        reporter.line(f"the report could not be written: {error}")


def _keep_stages(folder: Path, reporter: Reporter) -> None:
    """Add how long each stage took to what the folder says of the machine."""
    stages = {name: dataclasses.asdict(stage) for name, stage in reporter.stages.all().items()}
    with contextlib.suppress(OSError, ValueError):  # a full disk, of which the report has spoken
        write_json(folder / ENVIRONMENT, {**json.loads((folder / ENVIRONMENT).read_text()), "stages": stages})


def announce_end(run: CheckedRun, batches: Batches, folder: Path, stop: StopRequests, reporter: Reporter) -> int:
    """Print how many updates were done, how long it all took, and how to go on after a request to stop (collective).

    Args:
        run: that was trained.
        batches: where it ended.
        folder: of the run.
        stop: whether this rank was asked to.
        reporter: prints.

    Returns:
        The exit status, the same on all ranks: STOPPED if the run is not at its end and any rank had SIGUSR1, else 0.
    """
    told = collect((cpu_seconds(), stop.to_be_continued))
    spent = sum(seconds for seconds, _ in told)
    step, last = batches.step, batches.expected_last
    if not batches.is_over:
        reporter.line(f"stopped on request after step {step} of {last}; continue with --resume {folder}")
    reporter.line(folded(reporter.stages.describe()))
    reporter.line(
        f"{step - run.first} steps done; {clock(reporter.stages.seconds())} in all, {spent:,.0f} s of processor time"
    )
    return STOPPED if not batches.is_over and any(to_be_continued for _, to_be_continued in told) else 0
