"""The training loop: gradient accumulation with one global normaliser, validation, logging, checkpoints, stopping."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import TrainingFailure
from ..common.reporter import TrainingBar
from ..configuration.config import RunConfig
from ..data.feed import BatchFeed
from ..data.masking import MaskedBatch
from ..data.rows import MaskedRows
from ..rules.global_batch import BatchPlan
from ..runs.loggers import MetricLogger
from .engines import TrainingEngine
from .ranks import collect_failures
from .step_metrics import StepMetrics


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (dropout) from the run's seed, the step and the rank.

    A random state that is a function of the step needs no saving: a resumed run draws what the uninterrupted one did.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def accumulate_step(
    engine: TrainingEngine, batches: list[MaskedBatch], stop_requested: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one update: the gradient of sum(cross-entropy) / (masked tokens of the whole global batch).

    Args:
        engine: wrapped model and optimizer.
        batches: this rank's micro-batches of the step.
        stop_requested: this rank was asked to stop.

    Returns:
        This rank's summed cross-entropy over the number of masked tokens of the global batch (its sum over the
        ranks is the loss), and [masked tokens, ranks asked to stop], both summed over all ranks, on the host.
    """
    masked = sum(len(batch.labels) for batch in batches)
    # The stop flags ride along with the normaliser, so all ranks stop after the same step at no extra cost.
    totals = engine.sum_over_ranks(torch.tensor([float(masked), float(stop_requested)], dtype=torch.float64))
    # A copy queued here lets the host read the flags at the end without waiting for the step itself.
    totals_on_host = totals.to("cpu", non_blocking=True)
    arrived = _mark(engine.device)
    normaliser = totals[0].clamp(min=1.0).float()
    loss_sum = torch.zeros((), device=engine.device)
    for number, batch in enumerate(batches, start=1):
        engine.begin_micro_batch(last=number == len(batches))
        loss, _ = engine.loss(batch.to(engine.device))
        loss = loss / normaliser
        loss_sum += loss.detach()
        engine.backward(loss)
        engine.step()
    if arrived is not None:
        arrived.synchronize()
    return loss_sum, totals_on_host


def validate(engine: TrainingEngine, batches: list[MaskedBatch]) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy on the masked tokens of all ranks' batches."""
    engine.train(False)
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            loss, correct = engine.loss(batch.to(engine.device))
            sums += torch.stack([loss.double(), correct.double(), loss.new_tensor(len(batch.labels)).double()])
    engine.train(True)
    loss_total, correct_total, tokens = engine.sum_over_ranks(sums).tolist()
    return loss_total / max(tokens, 1.0), correct_total / max(tokens, 1.0)


@dataclass
class TrainingLoop:
    """Trains from one step of a phase to another and reports; every rank runs it in step.

    Attributes:
        engine: wrapped model and optimizer.
        training_rows: packed rows, of which each step takes the next global batch.
        validation_batches: this rank's validation micro-batches, the same every time.
        plan: global batch.
        config: how often to log, validate and write checkpoints.
        seed: of the run.
        unigram_entropy: baseline, logged next to the validation loss.
        step_metrics: measures every update.
        metrics: takes the records.
        display: progress on the first rank.
        checkpoint: writes a checkpoint of the given step (collective).
        stop_requested: asks whether this rank should stop.
        phase_first: updates done before the phase that the loop trains.
        sequences_before: sequences read before it.
        data_workers: processes that make the batches of this rank ahead of time; 0: made when they are needed.
    """

    engine: TrainingEngine
    training_rows: MaskedRows
    validation_batches: list[MaskedBatch]
    plan: BatchPlan
    config: RunConfig
    seed: int
    unigram_entropy: float
    step_metrics: StepMetrics
    metrics: MetricLogger
    display: TrainingBar
    checkpoint: Callable[[int], Any]
    stop_requested: Callable[[], bool]
    phase_first: int = 0
    sequences_before: int = 0
    data_workers: int = 0
    _first: int = 0
    _started_at: float = 0.0

    def run(self, first: int, last: int) -> tuple[int, bool]:
        """Do the updates first + 1 .. last.

        Returns:
            The number of updates done in all, and whether a request to stop ended the run before `last`.
        """
        feed = BatchFeed(
            self.training_rows,
            self.plan,
            self.engine.rank,
            first - self.phase_first,
            last - self.phase_first,
            self.data_workers,
            pin_memory=self.engine.device.type == "cuda",
        )
        with contextlib.closing(feed):
            self._require_data(feed)
            step, stopped = self._train(first, last, feed)
            self._require_data(feed)
        return step, stopped

    def _train(self, first: int, last: int, feed: BatchFeed) -> tuple[int, bool]:
        self._mark_time(first)
        saved = first
        step, stopped = first, False
        while step < last and not stopped:
            stopped = self._update(step, feed)
            step += 1
            if step == last or stopped or step % self.config.log_every == 0:
                self._log(step, last)
            if step == last or _due(step, self.config.validate_every):
                self._validate(step)
            if not stopped and step < last and _due(step, self.config.checkpoint_every):
                self._checkpoint(step, last)
                saved = step
        if saved != step:
            self._checkpoint(step, last)
        return step, stopped and step < last

    def _checkpoint(self, step: int, last: int) -> None:
        """Write a checkpoint, of a state that can be continued only."""
        self._log(step, last)  # raises if a loss since the last log was not finite
        # The last update has no loss yet that would show what it did to the weights.
        with self.step_metrics.not_training():
            loss, _ = validate(self.engine, self.validation_batches[:1])
        if not math.isfinite(loss):
            raise TrainingFailure(
                f"after the update of step {step} the loss on held-out text is {loss}; no checkpoint of it was written"
            )
        self.checkpoint(step)

    def _require_data(self, feed: BatchFeed) -> None:
        """Raise on all ranks if one of them cannot read the data of its next step."""
        broken = self.engine.sum_over_ranks(torch.tensor([float(feed.failure is not None)]))
        if broken.item():
            raise TrainingFailure("; ".join(collect_failures(feed.failure)))

    def _update(self, step: int, feed: BatchFeed) -> bool:
        seed_step(self.seed, step, self.engine.rank)
        batches = feed.take()
        learning_rate = self.engine.learning_rate()
        loss, totals = accumulate_step(self.engine, batches, self.stop_requested() or feed.failure is not None)
        read = self.sequences_before + (step + 1 - self.phase_first) * self.plan.sequences
        length = self.training_rows.rows.shape[1]
        self.step_metrics.add(step + 1, read, self.plan, length, learning_rate, loss, int(totals[0]), feed.wait_seconds)
        return bool(totals[1] > 0)

    def _log(self, step: int, last: int) -> None:
        records = self.step_metrics.fetch()
        if not records:
            return
        for record in records:
            self.metrics.write(record)
        per_step = (time.perf_counter() - self._started_at) / (step - self._first)
        self.display.update(records[-1], per_step * (last - step))
        broken = next((record for record in records if not math.isfinite(record["loss"])), None)
        if broken is not None:
            raise TrainingFailure(f"the loss became {broken['loss']} at step {broken['step']}")

    def _validate(self, step: int) -> None:
        with self.step_metrics.not_training():
            loss, accuracy = validate(self.engine, self.validation_batches)
        self.metrics.write(
            {
                "kind": "validation",
                "step": step,
                "validation_loss": loss,
                "validation_accuracy": accuracy,
                "unigram_entropy": self.unigram_entropy,
            }
        )
        self.display.reporter.line(
            f"step {step}: validation loss {loss:.4f} (unigram entropy {self.unigram_entropy:.4f}), "
            f"masked accuracy {accuracy:.2%}"
        )

    def _mark_time(self, step: int) -> None:
        self._started_at = time.perf_counter()
        self._first = step
        self.step_metrics.begin()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
