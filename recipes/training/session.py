"""What surrounds training, whichever loop trains: exit status and errors, output folder, data, report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..common.errors import RecipeError, TrainingFailure
from ..common.files import write_json
from ..common.machine import describe_machine
from ..common.reporter import Reporter
from ..configuration.command_line import Invocation, parse_command_line
from ..configuration.config import DataConfig, RecipeConfig
from ..configuration.phases import Phase, describe_plan
from ..configuration.presets import list_presets
from ..data.feed import default_workers
from ..data.preparation import prepare
from ..data.prepared import PreparedData
from ..data.rows import MaskedRows
from ..runs.checkpoints import CheckpointFolder, check_same_run, run_of
from ..runs.folder import CONFIG, DEEPSPEED_CONFIG, ENVIRONMENT, claim_folder, fresh_folder
from ..runs.report import write_report
from .checks import CheckedRun, early_identity, require_memory
from .ranks import collect, on_each_machine, rank, ranks_on_machine, world_size

BAD_INPUT = 2


FAILED = 3


INTERRUPTED = 130


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


def announce(run: CheckedRun, reporter: Reporter) -> None:
    """Print the resolved configuration and the plan of the phases."""
    reporter.line(f"preset {run.config.preset}, resolved configuration:")
    for section, fields in run.config.to_dict().items():
        if section != "preset":
            reporter.line("  " + " ".join(f"{section}.{name}={_shown(value)}" for name, value in fields.items()))
    for line in describe_plan(run.config, world_size()):
        reporter.line(line)


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


def _shown(value: Any) -> str:
    return str(value).replace(" ", "")
