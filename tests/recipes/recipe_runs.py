"""Runs of the recipe inside the worker processes of a pool, with injected failures if asked for."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

SMALL = (
    *("--sequence_length", "16", "--global_batch", "16", "--micro_batch", "4"),
    *("data.vocabulary=200", "data.validation_fraction=0.2", "data.validation_sequences=10"),
    *("model.hidden=32", "model.intermediate=64", "run.validate_every=5", "run.noise_scale=true"),
)
"""Updates of 2 ranks x 2 x 4 sequences of 16 tokens."""

TWO_PHASES = (
    *(*SMALL, "--steps", "6", "model.max_positions=32", "model.dropout=0.1", "run.checkpoint_every=5"),
    *("phase_two.steps=4", "phase_two.sequence_length=32", "phase_two.global_batch=8", "phase_two.micro_batch=1"),
)
"""Ten updates: six of them, then four of 2 x 4 x 1 sequences of 32."""

GROWING = (
    *("--sequence_length", "16", "--global_batch", "16", "--micro_batch", "2", "--steps", "6"),
    *("data.vocabulary=200", "data.validation_fraction=0.2", "data.validation_sequences=10"),
    *("model.hidden=32", "model.intermediate=64", "model.max_positions=32", "run.validate_every=0"),
    *("run.batch_from_noise=true", "run.smallest_batch=4", "run.batch_every=2", "run.noise_per_batch=0.001"),
    *("optimizer.lr=0.002", "run.checkpoint_every=1", "run.keep_checkpoints=99"),
)
"""96 sequences in updates of 4, 8 or 16 on two ranks, with a noise scale that is nearly always large enough."""

GROWING_TWICE = (
    *GROWING,
    *("phase_two.steps=4", "phase_two.sequence_length=32", "phase_two.global_batch=8", "phase_two.micro_batch=1"),
)
"""After them 32 sequences of 32 tokens in updates of 2, 4 or 8."""

WARMED_UP = (
    *(option for option in GROWING_TWICE if not option.startswith(("run.batch_", "run.noise_"))),
    *("run.batch_warmup=0.5", "schedule.shape=wsd", "run.noise_scale=false"),
)
"""96 sequences in two updates each of 4, 8 and 12 and three of 16, then 32 of 32 tokens in four of 8."""


def train(
    cache: str,
    environment: dict[str, str],
    script: str,
    arguments: list[str],
    sabotage: str = "",
    report: bool = False,
) -> str:
    """Run the recipe on this rank as a launcher would have started it; return how it ended.

    Args:
        cache: folder of the prepared data.
        environment: what the launcher sets.
        script: "bert.py", "bert_accelerate.py" or "bert_trainer.py".
        arguments: the command line.
        sabotage: name of a failure to inject, see `_sabotaged`.
        report: draw it; always done where something fails. Its pictures take longer than these runs.
    """
    from trustratio.recipes.common.errors import RecipeError, TrainingFailure
    from trustratio.recipes.common.reporter import Reporter
    from trustratio.recipes.configuration.command_line import parse_command_line
    from trustratio.recipes.runs import report as reports
    from trustratio.recipes.training import bert, bert_trainer
    from trustratio.recipes.training.checks import check_run
    from trustratio.recipes.training.launchers import AccelerateLauncher, DeepSpeedLauncher

    reporter = Reporter(active=dist.get_rank() == 0)
    drawn = report or bool(sabotage)
    pictures = contextlib.nullcontext() if drawn else mock.patch.object(reports, "write_report", return_value="")
    environment = {**environment, "TRUSTRATIO_CACHE": cache}
    with mock.patch.dict(os.environ, environment), _sabotaged(sabotage), pictures:
        try:
            invocation = parse_command_line(arguments)
            if script == "bert_trainer.py":
                bert_trainer.pretrain(bert_trainer.check_trainer_run(invocation), reporter)
            else:
                launcher = AccelerateLauncher() if script == "bert_accelerate.py" else DeepSpeedLauncher()
                bert.pretrain(check_run(invocation, launcher), reporter)
        except (RecipeError, TrainingFailure) as error:
            return f"{type(error).__name__}: {error}"
    return "finished"


def recipe(text: str, output: Path, *arguments: str, settings: tuple[str, ...] = TWO_PHASES) -> list[str]:
    """Return the command line of a small run."""
    return ["--data", f"{text}/*.txt", *settings, "--output", str(output), *arguments]


def records(folder: Path, kind: str = "train") -> list[dict]:
    """Return the records of a run's metrics.jsonl, in order."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(folder: Path) -> list[float]:
    """Return a run's training losses, one per update."""
    return [record["loss"] for record in records(folder)]


def trained_tensors(checkpoint: Path) -> list[torch.Tensor]:
    """Return every tensor of a checkpoint's files, in a fixed order."""

    def tensors(value: object) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return [tensor for item in inner for tensor in tensors(item)]

    files = sorted(checkpoint.rglob("*.pt"))
    return [tensor for file in files for tensor in tensors(torch.load(file, weights_only=False, map_location="cpu"))]


@contextlib.contextmanager
def _sabotaged(what: str):
    """Make one thing fail on the last rank: its loss of step 8, its weights after step 10, its rows from the fortieth
    sequence on, or its disk.

    Or on the first one, which alone writes it: of step 10 the state under DDP, the Trainer's model, or DeepSpeed's
    file `latest`; the run's folder, its configuration, the prepared data, the metrics from the beginning or from step
    7 on, or the finished model of the Trainer.
    """
    from trustratio.recipes.training import bert_trainer, records, session

    last_rank = dist.get_rank() == dist.get_world_size() - 1
    patches = {
        "": lambda: [],
        "loss": lambda: _broken_losses(last_rank),
        "weights": lambda: _broken_weights(last_rank),
        "rows": lambda: [_broken_rows(last_rank)],
        "disk": lambda: [_full_disk(last_rank)],
        "state": lambda: [_full_disk(dist.get_rank() == 0)],
        "model": lambda: [_full_disk_for_the_model(dist.get_rank() == 0)],
        "latest": lambda: _full_disk_for_latest(dist.get_rank() == 0),
        "folder": lambda: [_read_only(session, "claim_folder")],
        "config": lambda: [_read_only(session, "write_json")],
        "cache": lambda: [_read_only(session, "prepare")],
        "open": lambda: [_read_only(records, "MetricLoggers")],
        "metrics": lambda: [_full_disk_for_metrics()],
        "final model": lambda: [_read_only(bert_trainer, "save_weights")],
    }
    with contextlib.ExitStack() as stack:
        for patch in patches[what]():
            stack.enter_context(patch)
        yield


def _broken_losses(here: bool) -> list:
    from trustratio.recipes.training.engines import DataParallelTraining, DeepSpeedTraining
    from trustratio.recipes.training.trainer import RecipeTrainer

    def of_engine(engine):
        loss = engine.loss

        def broken(self, batch):
            value, correct = loss(self, batch)
            return (value * float("nan") if here and self.scheduler.last_epoch == 7 else value), correct

        return mock.patch.object(engine, "loss", broken)

    training_step = RecipeTrainer.training_step

    def broken_step(self, model, *arguments):
        if here and self.progress.step == 7:
            _fill(self.parts.model, float("nan"))
        return training_step(self, model, *arguments)

    of_trainer = mock.patch.object(RecipeTrainer, "training_step", broken_step)
    return [of_engine(DeepSpeedTraining), of_engine(DataParallelTraining), of_trainer]


def _broken_weights(here: bool) -> list:
    from trustratio.recipes.training.engines import DataParallelTraining, DeepSpeedTraining
    from trustratio.recipes.training.trainer import _Progress

    def of_engine(engine, wrapped):
        step = engine.step

        def breaking(self):
            step(self)
            if here and self.scheduler.last_epoch == 10:
                _fill(wrapped(self).module, float("inf"))

        return mock.patch.object(engine, "step", breaking)

    on_step_end = _Progress.on_step_end

    def breaking_end(self, args, state, control, **options):
        if here and state.global_step == 10:
            _fill(self.trainer.parts.model, float("inf"))
        on_step_end(self, args, state, control, **options)

    return [
        of_engine(DeepSpeedTraining, lambda training: training.engine),
        of_engine(DataParallelTraining, lambda training: training.model),
        mock.patch.object(_Progress, "on_step_end", breaking_end),
    ]


def _fill(model: torch.nn.Module, value: float) -> None:
    next(model.parameters()).data.fill_(value)


def _read_only(module, name: str):
    """Have the first rank find a place read-only where it calls `name`."""
    function = getattr(module, name)

    def refused(*arguments, **options):
        if dist.get_rank() == 0:
            raise OSError(30, "Read-only file system", "some/place")
        return function(*arguments, **options)

    return mock.patch.object(module, name, refused)


def _full_disk_for_metrics():
    from trustratio.recipes.runs.metrics import MetricsLog

    write = MetricsLog.write

    def full(self, record):
        if dist.get_rank() == 0 and record["step"] >= 7:
            raise OSError(28, "No space left on device")
        write(self, record)

    return mock.patch.object(MetricsLog, "write", full)


def _broken_rows(here: bool):
    from trustratio.recipes.common.errors import RecipeError
    from trustratio.recipes.data.rows import MaskedRows

    step_batches = MaskedRows.step_batches

    def breaking(self, step, plan, rank):
        if here and (step + 1) * plan.sequences > 40:
            raise RecipeError("the token file is cut short")
        return step_batches(self, step, plan, rank)

    return mock.patch.object(MaskedRows, "step_batches", breaking)


def _full_disk(here: bool):
    save = torch.save

    def full(state, file, *arguments, **options):
        if here and "step-00000010" in str(file):
            Path(file).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return save(state, file, *arguments, **options)

    return mock.patch.object(torch, "save", full)


def _full_disk_for_the_model(here: bool):
    from safetensors import SafetensorError

    from trustratio.recipes.training.trainer import RecipeTrainer

    write = RecipeTrainer._save

    def full(self, folder, *arguments, **options):
        if here and "step-00000010" in folder:
            raise SafetensorError("No space left on device")
        write(self, folder, *arguments, **options)

    return mock.patch.object(RecipeTrainer, "_save", full)


def _full_disk_for_latest(here: bool) -> list:
    open_file = io.open

    def full(path, *arguments, **options):
        if here and "step-00000010" in str(path) and Path(path).name == "latest":
            raise OSError(28, "No space left on device")
        return open_file(path, *arguments, **options)

    return [mock.patch.object(module, "open", full) for module in (io, builtins)]
