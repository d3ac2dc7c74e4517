"""The recipe with the Trainer's loop in place of its own: same configuration, data order, masks, loss and schedule.

What the Trainer takes for a batch is all that this rank reads for one update; `RecipeTrainer.training_step` accumulates
over its micro-batches. So one Trainer with one wrapper trains both phases, which accumulate differently.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trustratio.integrations.accelerate import count_ranks_on_cpu

from ..common.errors import RecipeError, TrainingFailure
from ..common.reporter import Reporter, clock
from ..configuration.command_line import Invocation
from ..configuration.phases import carry_over
from ..data.feed import BatchFeed
from ..data.masking import MaskedBatch
from ..data.prepared import PreparedData
from ..data.rows import MaskedRows
from ..model.build import RecipeParts
from ..model.flops import ModelFlops, peak_of
from ..model.masked_language_model import padded_vocabulary
from ..runs.checkpoints import CheckpointFolder
from ..runs.loggers import MetricLoggers
from . import bert as bert_pretraining
from .bert import build_parts
from .checks import CheckedRun
from .engines import DistributedTraining, postponed_failures, set_batch_plan
from .launchers import AccelerateFrontEnd, DeepSpeedFrontEnd, FrontEnd, without_variable
from .loop import seed_step
from .ranks import collect_failures, on_first_rank, rank, start
from .session import _report, claim_output, data_workers, masked_rows, prepare_run, run_command, where_to_go_on
from .step_metrics import StepMetrics, measures_noise
from .stop_requests import StopRequests

MODEL = "model"
"""Folder of a run that `from_pretrained` loads."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return the process's exit status, as `bert.main` does."""
    return run_command(arguments, check_run, pretrain)


def check_run(invocation: Invocation) -> CheckedRun:
    """Check what `bert.py` checks, for the launcher that started this process.

    Raises:
        RecipeError: any bad input; a checkpoint that the Trainer did not write.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by `accelerate launch`, always
    front_end: FrontEnd = AccelerateFrontEnd() if launched else DeepSpeedFrontEnd()
    if invocation.resume is not None:
        trainers_part(invocation.resume)
    return bert_pretraining.check_run(invocation, front_end)


def trainers_part(checkpoint: Path) -> Path:
    """Return the folder in a checkpoint of the recipe that the Trainer wrote and resumes from.

    Raises:
        RecipeError: there is none.
    """
    found = sorted(checkpoint.glob("checkpoint-*"))
    if not found:
        raise RecipeError(
            f"{checkpoint} was not written by bert_trainer.py; continue it with the script that wrote it, bert.py or "
            "bert_accelerate.py"
        )
    return found[-1]


def pretrain(run: CheckedRun, reporter: Reporter) -> None:
    """Prepare the data, train with the Trainer, save the model in transformers' format and draw the report (all ranks).

    Raises:
        RecipeError: bad data, a checkpoint of other data, an output folder in use, refused optimizer options.
        TrainingFailure: training could not go on; the report is drawn, and the message names the last good checkpoint.
    """
    began = time.perf_counter()
    start()
    config = run.config
    data, identity = prepare_run(run, reporter)
    parts = build_parts(config, data[0].vocabulary_size)
    folder = on_first_rank(lambda: claim_output(run))
    reporter.line(f"output folder: {folder}; {clock(time.perf_counter() - began)} until here")
    checkpoints = CheckpointFolder(folder, config.run.keep_checkpoints, identity)
    metrics = MetricLoggers(folder, config.run.loggers, config.to_dict(), active=reporter.active)
    try:
        with contextlib.closing(metrics), StopRequests() as stop:
            trainer = RecipeTrainer(run, data, parts, checkpoints, metrics, stop, reporter)
            trainer.train(None if run.invocation.resume is None else str(trainers_part(run.invocation.resume)))
            trainer.updates.require_data()
    except TrainingFailure as failure:
        raise TrainingFailure(f"{failure}; {where_to_go_on(checkpoints)}") from failure
    finally:  # also of a run that broke down
        _report(folder, reporter)
    step = trainer.state.global_step
    if step < run.last:
        reporter.line(f"stopped on request after step {step} of {run.last}; continue with --resume {folder}")
    save_weights(trainer, folder / MODEL)
    if reporter.active:
        (folder / MODEL / "tokenizer.json").write_bytes(Path(data[0].folder, "tokenizer.json").read_bytes())
    reporter.line(f"{step - run.first} steps done; {clock(time.perf_counter() - began)} in all")


def save_weights(trainer: Trainer, folder: Path) -> None:
    """Write the model in transformers' format (collective); parts that ZeRO-3 holds elsewhere are gathered first."""
    assert trainer.model is not None
    sharded = [parameter for parameter in trainer.model.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        if trainer.args.should_save:
            trainer._save(str(folder))


class Updates(IterableDataset[list[MaskedBatch]]):
    """Micro-batches of this rank, a list for each update of each phase, from the first to be done.

    Attributes:
        wait_seconds: how long the last list was waited for.
        failure: why the next list cannot be made; None if it can.
    """

    def __init__(self, run: CheckedRun, rows: Sequence[MaskedRows], device: torch.device) -> None:
        """Read the rows of each phase as its batch plan says."""
        self.run, self.rows, self.device = run, rows, device
        self.wait_seconds = 0.0
        self.failure: RecipeError | None = None

    def __iter__(self) -> Iterator[list[MaskedBatch]]:
        """Yield the micro-batches of each update; ends before a phase whose data cannot be read."""
        run = self.run
        for phase, plan, rows in zip(run.phases, run.plans, self.rows, strict=True):
            first, last = max(run.first, phase.first), min(run.last, phase.last)
            if first >= last:
                continue
            workers = data_workers(run.config.data, self.device)
            steps = (first - phase.first, last - phase.first)
            on_gpu = self.device.type == "cuda"
            feed = BatchFeed(rows, plan, rank(), *steps, workers, pin_memory=on_gpu)
            with contextlib.closing(feed):
                self.failure = feed.failure
                self.require_data()
                for _ in range(first, last):
                    batches = feed.take()
                    self.wait_seconds, self.failure = feed.wait_seconds, feed.failure
                    yield batches

    def require_data(self) -> None:
        """Raise on all ranks if one of them cannot read its next update's data (collective).

        Raises:
            TrainingFailure: so.
        """
        failures = collect_failures(self.failure)
        if failures:
            raise TrainingFailure("; ".join(failures))


class RecipeTrainer(Trainer):
    """A Trainer that is fed the recipe's updates and takes its optimizer, schedule, validation and checkpoints."""

    def __init__(
        self,
        run: CheckedRun,
        data: Sequence[PreparedData],
        parts: RecipeParts,
        checkpoints: CheckpointFolder,
        metrics: MetricLoggers,
        stop: StopRequests,
        reporter: Reporter,
    ) -> None:
        """Set up; records go to `metrics`, checkpoints to `checkpoints`; `stop` ends the run after an update."""
        self.run, self.data, self.parts, self.checkpoints = run, data, parts, checkpoints
        self.stop, self.reporter = stop, reporter
        self.stopping = False
        self.loss = torch.zeros(())
        self.masked, self.norm = 0, None
        super().__init__(parts.model, training_arguments(run, checkpoints.folder))
        # One batch of the Trainer is one update; DeepSpeed was told of the micro-batches.
        self.args.gradient_accumulation_steps = 1
        rows = [masked_rows(prepared, run.config) for prepared in data]
        self.updates = Updates(run, [training for training, _ in rows], self.args.device)
        self.validation_rows = [validation for _, validation in rows]
        self.remove_callback(PrinterCallback)
        self.records = _Records(self, metrics)
        self.add_callback(self.records)

    @property
    def phase(self) -> int:
        """Index of the phase of the update that is being done, or has just been done."""
        phases = self.run.phases
        return next(i for i, phase in enumerate(phases) if self.records.update < phase.last or phase is phases[-1])

    def get_train_dataloader(self) -> DataLoader:
        """Return the updates; they are made per rank, so nothing is left for accelerate to distribute."""
        return DataLoader(self.updates, batch_size=None)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the recipe's optimizer; an override survives DeepSpeed, `Trainer(optimizers=...)` does not."""
        self.optimizer = self.parts.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the recipe's schedule, on the optimizer inside all wrappers."""
        if self.lr_scheduler is None:
            self.lr_scheduler = self.parts.schedule(self.parts.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Accumulate the gradient of the mean over the masked tokens of the whole global batch.

        Args:
            model: wrapped.
            inputs: this rank's micro-batches of the update.
            num_items_in_batch: not used; counted here.

        Returns:
            This rank's summed loss over the masked tokens of the global batch, times the ranks: the Trainer averages.
        """
        model.train()
        ranks = self.run.plans[self.phase].ranks
        asked = self.stop.requested or self.updates.failure is not None
        totals = torch.tensor([float(sum(len(b.labels) for b in inputs)), float(asked)], device=self.args.device)
        dist.all_reduce(totals)
        normaliser = totals[0].clamp(min=1.0)
        self.loss = torch.zeros((), device=self.args.device)
        deepspeed = isinstance(model, DeepSpeedEngine)
        for number, batch in enumerate(inputs, start=1):
            last = number == len(inputs)
            self.accelerator.gradient_state._set_sync_gradients(last)
            # DeepSpeed is told by the flag alone.
            with contextlib.nullcontext() if last or deepspeed else self.accelerator.no_sync(model):
                loss, _ = model(**vars(batch.to(self.args.device)))
                loss = loss / normaliser
                self.loss += loss.detach()
                # DeepSpeed and DDP average over the ranks; DeepSpeed, unless told otherwise, over the accumulation too.
                self.accelerator.backward(loss * ranks, **({"scale_wrt_gas": False} if deepspeed else {}))
        masked, stopping = totals.tolist()
        self.masked, self.stopping = int(masked), stopping > 0
        return self.loss * ranks

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Note the norm that the Trainer measures before it clips."""
        self.norm = super()._get_grad_norm(model, grad_norm)
        return self.norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the recipe's records have the model's FLOP/s."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return cross-entropy in nats and accuracy on the phase's validation rows, over all ranks."""
        with self.records.measured.not_training():
            loss, accuracy = self._validate(self._validation_batches())
        self.records.validation(self.state.global_step, loss, accuracy, self.data[self.phase].unigram_entropy)
        metrics = {"eval_loss": loss, "eval_accuracy": accuracy}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_batches(self) -> list[MaskedBatch]:
        plan = self.run.plans[self.phase]
        return self.validation_rows[self.phase].validation_batches(
            plan.micro, rank(), plan.ranks, self.run.config.data.validation_sequences
        )

    @torch.no_grad()
    def _validate(self, batches: list[MaskedBatch]) -> tuple[float, float]:
        model = self.model_wrapped
        model.eval()  # DeepSpeed's returns nothing
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            loss, correct = model(**vars(batch.to(self.args.device)))
            sums += torch.stack([loss.double(), correct.double(), loss.new_tensor(len(batch.labels)).double()])
        model.train()
        dist.all_reduce(sums)
        loss_sum, correct_sum, tokens = sums.tolist()
        return loss_sum / max(tokens, 1.0), correct_sum / max(tokens, 1.0)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write what the Trainer writes as a checkpoint of the run: complete, or not there at all.

        Raises:
            TrainingFailure: it could not be written, or the last update broke the weights.
        """
        step = self.state.global_step
        with self.records.measured.not_training():
            loss, _ = self._validate(self._validation_batches()[:1])
            if not math.isfinite(loss):
                raise TrainingFailure(
                    f"after the update of step {step} the loss on held-out text is {loss}; no checkpoint of it was "
                    "written"
                )
            save = functools.partial(self._save_into, model, trial)
            first = rank() == 0
            path = self.checkpoints.write(step, save, collect_failures, first)
        self.reporter.line(f"step {step}: checkpoint {path}")

    def _save_into(self, model: Any, trial: Any, folder: Path) -> None:
        engine = self.model_wrapped if isinstance(self.model_wrapped, DeepSpeedEngine) else None
        usual = self.args.output_dir
        self.args.output_dir = str(folder)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(postponed_failures(self, "_save"))  # the model, on the first rank
                if engine is not None:
                    stack.enter_context(postponed_failures(engine.checkpoint_engine, "save"))
                    stack.enter_context(_without_latest(engine))
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = usual
        if engine is not None and rank() == 0:
            (trainers_part(folder) / "latest").write_text(f"global_step{engine.global_steps}")


@contextlib.contextmanager
def _without_latest(engine: DeepSpeedEngine) -> Iterator[None]:
    """Keep DeepSpeed from writing its file `latest`, which the first rank does while the others wait for it."""
    engine.save_checkpoint = functools.partial(engine.save_checkpoint, save_latest=False)
    try:
        yield
    finally:
        del engine.save_checkpoint


def training_arguments(run: CheckedRun, folder: Path) -> TrainingArguments:
    """Return the configuration in the Trainer's words; what happens after which update, `_Records` says."""
    training = run.config.training
    on_cpu = get_accelerator().device_name() == "cpu"
    settings = copy.deepcopy(run.settings)
    if settings is not None and on_cpu:
        count_ranks_on_cpu()
    # The launcher's list of fields, which accelerate holds against a complete configuration.
    with without_variable(os.environ, "ACCELERATE_CONFIG_DS_FIELDS"):
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=run.last,
            per_device_train_batch_size=run.plans[0].micro,
            gradient_accumulation_steps=run.plans[0].accumulation,
            max_grad_norm=training.gradient_clipping,
            bf16=training.precision == "bf16",
            fp16=training.precision == "fp16",
            seed=training.seed,
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            logging_nan_inf_filter=False,  # it would hide a loss that became NaN
            ignore_data_skip=True,  # `Updates` begins where the run goes on
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,  # there are none; the Trainer's default looks for them in every backward
            disable_tqdm=True,
            use_cpu=on_cpu and settings is None,
            deepspeed=settings,
            accelerator_config={"use_configured_state": on_cpu and settings is not None},
        )


class _Records(TrainerCallback):
    """Does before and after each update what the recipe's own loop does there."""

    def __init__(self, trainer: RecipeTrainer, metrics: MetricLoggers) -> None:
        self.trainer, self.metrics = trainer, metrics
        self.run, self.often = trainer.run, trainer.run.config.run
        self.update, self.rate = self.run.first, 0.0
        self.display = trainer.reporter.training_bar(self.run.first, self.run.last, self.often.print_every)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.engine = _WrappedByTrainer(self.trainer)
        if state.global_step:
            self.engine.continue_schedule(self.engine.scheduler.last_epoch)
        shape = self.run.config.model
        vocabulary = padded_vocabulary(self.trainer.data[0].vocabulary_size)
        self.measured = StepMetrics(
            self.engine,  # type: ignore[arg-type]
            ModelFlops(shape.layers, shape.hidden, shape.intermediate, vocabulary),
            peak_of(args.device, self.run.config.training.precision, self.often.peak_tflops),
            measures_noise(self.run.config, self.run.plans),
        )
        self._begin_phase()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update = state.global_step
        phase, second = self.run.phases[self.trainer.phase], self.run.config.phase_two
        if phase.number == 2 and self.update == phase.first:
            self._begin_phase()
            carry_over(self.engine.optimizer, second.keep_moments, second.reset_step)
        seed_step(args.seed, self.update, self.engine.rank)
        self.rate = self.engine.learning_rate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, trainer = state.global_step, self.trainer
        phase, plan = self.run.phases[trainer.phase], self.run.plans[trainer.phase]
        read = phase.sequences_before + (step - phase.first) * plan.sequences
        self.measured.add(
            *(step, read, plan, phase.sequence_length, self.rate, trainer.loss, trainer.masked),
            trainer.updates.wait_seconds,
        )
        ends = step in (phase.last, self.run.last)
        control.should_training_stop |= trainer.stopping
        control.should_evaluate = ends or _due(step, self.often.validate_every)
        control.should_save = ends or trainer.stopping or _due(step, self.often.checkpoint_every)
        if control.should_save or _due(step, self.often.log_every):
            self._log(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.close()

    def validation(self, step: int, loss: float, accuracy: float, entropy: float) -> None:
        """Write the record of a validation."""
        record = {"kind": "validation", "step": step, "validation_loss": loss, "validation_accuracy": accuracy}
        self.metrics.write({**record, "unigram_entropy": entropy})
        self.trainer.reporter.line(
            f"step {step}: validation loss {loss:.4f} (unigram entropy {entropy:.4f}), masked accuracy {accuracy:.2%}"
        )

    def _begin_phase(self) -> None:
        if isinstance(self.trainer.model_wrapped, DeepSpeedEngine):
            set_batch_plan(self.trainer.model_wrapped, self.run.plans[self.trainer.phase])
        self.measured.begin()

    def _log(self, step: int) -> None:
        records = self.measured.fetch()
        for record in records:
            self.metrics.write(record)
        self.display.update(records[-1], records[-1]["seconds"] * (self.run.last - step))
        broken = next((record for record in records if not math.isfinite(record["loss"])), None)
        if broken is not None:
            raise TrainingFailure(f"the loss became {broken['loss']} at step {broken['step']}")


class _WrappedByTrainer(DistributedTraining):
    """What `StepMetrics` observes, as the Trainer wrapped it."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        super().__init__(trainer.parts.optimizer, trainer.lr_scheduler, trainer.args.device)
        self.trainer = trainer

    def gradient_norm(self) -> float | None:
        """Return the global gradient norm of the last update before clipping."""
        norm = self.trainer.norm
        return None if norm is None else float(norm)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
