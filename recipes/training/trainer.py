"""The Hugging Face Trainer with the recipe's data order, masks, loss, schedule, records and checkpoints.

What the Trainer takes for a batch stands for one update; `RecipeTrainer.training_step` reads its micro-batches and
accumulates over them. So one Trainer with one wrapper trains both phases, and batches that grow.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
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

from trustratio.integrations.layer_norms import clip_grad_norm_

from ..common.errors import RecipeError, TrainingFailure
from ..common.progress import PROGRESS
from ..configuration.phases import carry_over
from ..data.feed import BatchFeed
from ..data.masking import MaskedBatch
from ..data.prepared import PreparedData
from ..model.build import RecipeParts
from ..rules.global_batch import BatchPlan
from ..runs.checkpoints import CheckpointFolder
from .batches import batches_of
from .checks import CheckedRun
from .discarding import without_smallest_losses
from .engines import DistributedTraining, postponed_failures, set_batch_plan
from .growth_state import trained_phase
from .launchers import mixed_precision, without_variable
from .loop import due, require_sound_weights, seed_step, validate
from .loss_scale import SkippedUpdates
from .phase_data import PhaseData, phases_with_data
from .ranks import collect_failures, rank, share_of_all
from .records import Records
from .second_pass import second_pass
from .step_metrics import StepMetrics, Update
from .stop_requests import StopRequests


class RecipeTrainer(Trainer):
    """A Trainer that is fed the recipe's updates and takes its optimizer, schedule, validation and checkpoints.

    Attributes:
        run: what is trained.
        phases: with their data.
        batches: where the run is, and how large its updates are.
        feed: makes the micro-batches of the phase; None before the first update.
        progress: what is done before and after each update.
        loss: this rank's part of the last update's loss.
        masked: tokens that are in the last update's loss, over all ranks.
        predicted: tokens that it predicted, over all ranks, if those with the smallest losses are discarded.
        passes: over the last update's micro-batches; 2 with a sample of the curvature.
        norm: of the last update's gradient before clipping; None before the first.
        stopping: whether any rank was asked to stop, or cannot read its next update.
    """

    # The Trainer declares torch's LambdaLR, and steps and saves whatever schedule it finds here.
    lr_scheduler: Any

    def __init__(
        self,
        run: CheckedRun,
        data: Sequence[PreparedData],
        parts: RecipeParts,
        checkpoints: CheckpointFolder,
        records: Records,
        stop: StopRequests,
    ) -> None:
        """Set up.

        Args:
            run: what to train.
            data: of each phase.
            parts: model, optimizer and schedule.
            checkpoints: writes the checkpoints.
            records: takes what is measured.
            stop: ends the run after an update.
        """
        self.run, self.parts, self.checkpoints, self.records, self.stop = run, parts, checkpoints, records, stop
        self.loss = torch.zeros((), device="cpu")
        self.masked, self.passes, self.norm, self.stopping = 0, 1, None, False
        self.predicted: int | None = None
        # DeepSpeed has followed this variable to the CPU, and accelerate would leave DeepSpeed out.
        with without_variable(os.environ, "ACCELERATE_USE_CPU"):
            super().__init__(parts.model, training_arguments(run, checkpoints.folder))
        # One batch of the Trainer is one update; DeepSpeed was told of the micro-batches.
        self.args.gradient_accumulation_steps = 1
        self.phases = phases_with_data(run, data, self.args.device)
        self.batches = batches_of(run)
        self.feed: BatchFeed | None = None
        self.remove_callback(PrinterCallback)
        self.progress = _Progress(self, parts.model.config.vocab_size)
        self.add_callback(self.progress)

    @property
    def data(self) -> PhaseData:
        """The phase of the update that is being done, or has just been done."""
        return self.phases[self.batches.phase.number - 1]

    def get_train_dataloader(self) -> DataLoader:
        """Return the updates' numbers: accelerate reads one ahead, when the batch is not known yet."""
        last = self.run.first if self.batches.is_over else self.run.last
        return DataLoader(Updates(self.run.first, last), batch_size=None)

    def open_feed(self) -> None:
        """Begin to read the phase that the next update is of (collective).

        Raises:
            TrainingFailure: a rank cannot.
        """
        self.close_feed()
        self.feed = self.batches.feed(self.data, rank(), self.args.device)
        self.require_data()

    def close_feed(self) -> None:
        """Stop the workers that read ahead."""
        if self.feed is not None:
            self.feed.close()

    def require_data(self) -> None:
        """Raise on all ranks if one of them cannot read its next update's data (collective).

        Raises:
            TrainingFailure: so.
        """
        failures = collect_failures(None if self.feed is None else self.feed.failure)
        if failures:
            raise TrainingFailure("; ".join(failures))

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
            inputs: the update's number; not used, the run knows where it is.
            num_items_in_batch: not used; counted here.

        Returns:
            This rank's summed loss over the masked tokens of the global batch, times the ranks: the Trainer averages.
        """
        assert self.feed is not None
        model.train()
        ranks, device = self.data.plan.ranks, self.args.device
        micro_batches, predicted = self.batches.take(self.feed), None
        if self.data.discard_smallest:
            share = self.data.discard_smallest
            micro_batches, predicted = without_smallest_losses(self.progress.observed, micro_batches, share)
        asked = self.stop.requested or self.feed.failure is not None or self.records.failure is not None
        # The stop flags ride along with the normaliser, so all ranks stop after the same update.
        totals = torch.tensor([float(sum(len(batch.labels) for batch in micro_batches)), float(asked)], device=device)
        dist.all_reduce(totals)
        normaliser = totals[0].clamp(min=1.0)
        self.passes = 1 + self.progress.observed.wants_second_pass()
        self.loss = self._pass(model, micro_batches, normaliser)
        if self.passes == 2:
            with self.progress.observed.second_pass():
                self._pass(model, micro_batches, normaliser)
        masked, stopping = totals.tolist()
        self.masked, self.predicted, self.stopping = int(masked), predicted, stopping > 0
        return self.loss * ranks

    def _pass(self, model: Any, micro_batches: Sequence[MaskedBatch], normaliser: torch.Tensor) -> torch.Tensor:
        """Run all micro-batches, forward and backward; return this rank's loss."""
        ranks, device = self.data.plan.ranks, self.args.device
        loss_sum = torch.zeros((), device=device)
        by_deepspeed = isinstance(model, DeepSpeedEngine)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            # DeepSpeed is told by the flag alone.
            with contextlib.nullcontext() if last or by_deepspeed else self.accelerator.no_sync(model):
                loss, _ = model(**vars(batch.to(device)))
                loss = loss / normaliser
                loss_sum += loss.detach()
                # DeepSpeed and DDP average over the ranks; DeepSpeed, unless told otherwise, over the accumulation too.
                with self.progress.observed.updating():  # DeepSpeed does the update there
                    self.accelerator.backward(loss * ranks, **({"scale_wrt_gas": False} if by_deepspeed else {}))
                PROGRESS.move()
        return loss_sum

    @property
    def _clips_bf16(self) -> bool:
        """Whether gradients are bf16 and nobody else clips them; torch would round their norm to bf16, too."""
        return self.run.config.training.master is not None and self.run.settings is None

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip by the global norm; return it."""
        if self._clips_bf16:
            return clip_grad_norm_(self.parts.optimizer, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Note the norm that the Trainer measures before it clips, of an update's first pass."""
        if grad_norm is None and self._clips_bf16:
            grad_norm = clip_grad_norm_(self.parts.optimizer, float("inf"))
        norm, first = super()._get_grad_norm(model, grad_norm), self.progress.observed.first_norm
        self.norm = norm if first is None else first
        return self.norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the recipe's records have the model's FLOP/s."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return cross-entropy in nats and accuracy on the phase's validation rows, over all ranks."""
        with self.progress.step_metrics.not_training(), self.records.stage("validation"):
            loss, accuracy = validate(self.progress.observed, self.data.validation_batches)
        self.records.validation(self.state.global_step, loss, accuracy, self.data.unigram_entropy)
        metrics = {"eval_loss": loss, "eval_accuracy": accuracy}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write what the Trainer writes as a checkpoint of the run: complete, or not there at all.

        Raises:
            TrainingFailure: it could not be written, or the last update broke the weights.
        """
        step = self.state.global_step
        with self.progress.step_metrics.not_training(), self.records.stage("checkpoints"):
            require_sound_weights(self.progress.observed, self.data, step)
            PROGRESS.begin(f"while writing the checkpoint of step {step}")
            save = functools.partial(self._save_into, model, trial)
            path = self.checkpoints.write(step, save, collect_failures, rank() == 0, share_of_all())
        self.records.line(f"step {step}: checkpoint {path}")

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
        self.progress.step_metrics.save(folder)
        self.batches.save(folder, self.progress.observed)
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


def trainers_part(checkpoint: Path) -> Path:
    """Return the folder in a checkpoint of the recipe that the Trainer wrote and resumes from.

    Raises:
        RecipeError: there is none.
    """
    parts = sorted(checkpoint.glob("checkpoint-*"))
    if not parts:
        raise RecipeError(
            f"{checkpoint} was not written by bert_trainer.py; continue it with the script that wrote it, bert.py or "
            "bert_accelerate.py"
        )
    return parts[-1]


def save_weights(trainer: Trainer, folder: Path) -> None:
    """Write the model in transformers' format (collective); parts that ZeRO-3 holds elsewhere are gathered first."""
    assert trainer.model is not None
    sharded = [parameter for parameter in trainer.model.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        if trainer.args.should_save:
            trainer._save(str(folder))


class Updates(IterableDataset[dict[str, int]]):
    """The numbers of the run's updates, from the first to be done to the last that there may be."""

    def __init__(self, first: int, last: int) -> None:
        """Count first .. last - 1, the updates done before each."""
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield them in the form of a batch; what an update reads is decided when it begins."""
        return ({"update": step} for step in range(self.first, self.last))


class _Progress(TrainerCallback):
    """Does before and after each update what `TrainingLoop` does there.

    Attributes:
        step: updates done before the one that is being done, or has just been done.
        observed: model and optimizer, from the beginning of training on.
        step_metrics: measures every update, from then on.
    """

    def __init__(self, trainer: RecipeTrainer, rows: int) -> None:
        self.trainer, self.rows = trainer, rows
        self.run, self.config = trainer.run, trainer.run.config
        self.step, self.learning_rate = self.run.first, 0.0
        self.plan: BatchPlan | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.observed = _WrappedByTrainer(self.trainer)
        if state.global_step:
            self.observed.continue_schedule(self.observed.scheduler.last_epoch)
        self.step_metrics = StepMetrics.of_run(self.observed, self.config, self.run.plans, self.rows)
        if self.run.invocation.resume is not None:
            self.step_metrics.load(self.run.invocation.resume)
        self.trainer.records.begin(self.run.first)
        if not self.trainer.batches.is_over:
            self._begin_phase()
        elif self.run.invocation.resume is not None:  # all that is left to do is to write the model
            self.trainer.parts.model.begin_phase(trained_phase(self.run.invocation.resume, self.run.phases))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        PROGRESS.begin(f"in update {self.step + 1}", update=self.step + 1)
        batches, second = self.trainer.batches, self.config.phase_two
        if batches.phase_is_over:
            self._begin_phase()
        if batches.at_border:
            carry_over(self.observed.optimizer, second.keep_moments, second.reset_step)
        seed_step(args.seed, self.step, self.observed.rank)
        self._set_out(batches.plan)
        self.learning_rate = self.observed.learning_rate()

    def _begin_phase(self) -> None:
        self.trainer.batches.enter_phase()
        self.trainer.parts.model.begin_phase(self.trainer.batches.phase)
        self.trainer.open_feed()
        self.step_metrics.begin()

    def _set_out(self, plan: BatchPlan) -> None:
        """Tell the wrapper of the next update's batch, if it is another, and of its learning rate."""
        if plan != self.plan and isinstance(self.trainer.model_wrapped, DeepSpeedEngine):
            set_batch_plan(self.trainer.model_wrapped, plan)
        self.plan = plan
        if self.trainer.batches.position is not None:
            self.observed.continue_schedule(self.trainer.batches.position)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, trainer, often = state.global_step, self.trainer, self.config.run
        self.observed.count_update()
        trainer.batches.advance()
        self._measure()
        self.observed.require_updates(often.most_skipped_updates)
        # The Trainer itself does nothing at any interval: what happens after this update is said here.
        ends = trainer.batches.phase_is_over
        control.should_training_stop |= trainer.stopping or trainer.batches.is_over
        control.should_evaluate = ends or due(step, often.validate_every)
        control.should_save = ends or trainer.stopping or due(step, often.checkpoint_every)
        if control.should_save or due(step, often.log_every) or trainer.batches.decides:
            fetched = self.step_metrics.fetch()
            trainer.records.updates(fetched, trainer.batches.expected_last)
            trainer.records.say(trainer.batches.note(fetched, self.observed))

    def _measure(self) -> None:
        """Take note of the update that was just done."""
        trainer, feed, plan = self.trainer, self.trainer.feed, self.plan
        assert feed is not None
        assert plan is not None
        self.step_metrics.add(
            Update(
                step=trainer.batches.step,
                phase=trainer.data.phase,
                plan=plan,
                learning_rate=self.learning_rate,
                loss=trainer.loss,
                masked_tokens=trainer.masked,
                predicted_tokens=trainer.predicted,
                data_wait=feed.wait_seconds,
                sequences=trainer.batches.sequences,
                passes=trainer.passes,
            )
        )


class _WrappedByTrainer(DistributedTraining):
    """`Observed`, as the Trainer wrapped it."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        super().__init__(trainer.parts.optimizer, trainer.lr_scheduler, trainer.args.device)
        self.trainer = trainer
        engine = trainer.model_wrapped
        self.skipped = SkippedUpdates(engine) if isinstance(engine, DeepSpeedEngine) else None

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Return what the last micro-batch of an update is done in; see `SkippedUpdates`."""
        return contextlib.nullcontext() if self.skipped is None else self.skipped.updating()

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Run the micro-batches again in the block; without DeepSpeed, the Trainer's step follows."""
        engine = self.trainer.model_wrapped
        with second_pass(self.optimizer, engine if isinstance(engine, DeepSpeedEngine) else None) as self.first_norm:
            yield

    def count_update(self) -> None:
        """Take note of whether DeepSpeed, if it is used, has skipped the update that was just done."""
        if self.skipped is not None:
            self.skipped.count()

    def require_updates(self, most_skipped: int) -> None:
        """Check that DeepSpeed, if it is used, has not skipped so many updates in a row."""
        if self.skipped is not None:
            self.skipped.require_fewer(most_skipped)

    def applied(self) -> bool:
        """Tell whether the last update moved the weights: DeepSpeed, if it is used, has not skipped it."""
        return self.skipped is None or not self.skipped.in_a_row

    def loss(self, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's summed loss and number of right predictions."""
        return self.trainer.model_wrapped(**vars(batch))

    def losses(self, batch: MaskedBatch) -> torch.Tensor:
        """Return the loss of each prediction."""
        return self.trainer.model_wrapped(**vars(batch), reduction="none")[0]

    def train(self, training: bool) -> None:
        """Switch between training and evaluation mode."""
        self.trainer.model_wrapped.train(training)

    def gradient_norm(self) -> float | None:
        """Return the global gradient norm of the last update before clipping."""
        norm = self.trainer.norm
        return None if norm is None else float(norm)


def training_arguments(run: CheckedRun, folder: Path) -> TrainingArguments:
    """Return the configuration in the Trainer's words; what happens after which update, `_Progress` says."""
    training = run.config.training
    on_cpu = get_accelerator().device_name() == "cpu"
    settings = copy.deepcopy(run.settings)
    # The launcher's list of fields, which accelerate holds against a complete configuration.
    with without_variable(os.environ, "ACCELERATE_CONFIG_DS_FIELDS"):
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=run.last,
            per_device_train_batch_size=run.plans[0].micro,
            gradient_accumulation_steps=run.plans[0].accumulation,
            max_grad_norm=training.gradient_clipping,
            bf16=mixed_precision(training, settings) == "bf16",
            fp16=mixed_precision(training, settings) == "fp16",
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
            use_cpu=on_cpu,
            deepspeed=settings,
        )
