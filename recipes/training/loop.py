"""The recipe's own loop: gradient accumulation with one global normaliser, validation, logs, checkpoints, stopping."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import TrainingFailure
from ..common.progress import PROGRESS
from ..configuration.config import RunConfig
from ..data.feed import BatchFeed
from ..data.masking import MaskedBatch
from .discarding import without_smallest_losses
from .engines import Observed, TrainingEngine
from .phase_data import PhaseData
from .ranks import collect_failures
from .records import WHAT_TO_TRY, Records
from .step_metrics import StepMetrics, Update


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
        PROGRESS.move()
    if arrived is not None:
        arrived.synchronize()
    return loss_sum, totals_on_host


def validate(engine: Observed, batches: list[MaskedBatch]) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy on the masked tokens of all ranks' batches."""
    PROGRESS.begin(f"while validating after update {PROGRESS.update}")
    engine.train(False)
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            loss, correct = engine.loss(batch.to(engine.device))
            sums += torch.stack([loss.double(), correct.double(), loss.new_tensor(len(batch.labels)).double()])
            PROGRESS.move()
    engine.train(True)
    loss_total, correct_total, tokens = engine.sum_over_ranks(sums).tolist()
    return loss_total / max(tokens, 1.0), correct_total / max(tokens, 1.0)


def require_sound_weights(engine: Observed, data: PhaseData, step: int) -> None:
    """Check that the weights after update `step` can be continued (collective).

    The losses of the updates cannot tell: the newest one was computed before the update that it led to.

    Raises:
        TrainingFailure: the loss on held-out text is not finite.
    """
    loss, _ = validate(engine, data.validation_batches[:1])
    if not math.isfinite(loss):
        raise TrainingFailure(
            f"after the update of step {step} the loss on held-out text is {loss}; no checkpoint of it was written; "
            f"{WHAT_TO_TRY}"
        )


def due(step: int, every: int) -> bool:
    """Tell whether something that is done every so many updates (0: never) is done after this one."""
    return every > 0 and step % every == 0


@dataclass
class TrainingLoop:
    """Trains from one update of a phase to another and reports; every rank runs it in step.

    Attributes:
        engine: wrapped model and optimizer.
        data: the phase and its data.
        config: how often to log, validate and write checkpoints.
        seed: of the run.
        step_metrics: measures every update.
        records: takes what was measured.
        checkpoint: writes a checkpoint of the given step (collective).
        stop_requested: asks whether this rank should stop.
    """

    engine: TrainingEngine
    data: PhaseData
    config: RunConfig
    seed: int
    step_metrics: StepMetrics
    records: Records
    checkpoint: Callable[[int], Any]
    stop_requested: Callable[[], bool]

    def run(self, first: int, last: int) -> int:
        """Do the run's updates first + 1 .. last, which lie in the phase.

        Returns:
            The number of updates done in all: fewer than `last` if a request to stop ended it.
        """
        feed = self.data.feed(first, last, self.engine.rank, self.engine.device)
        with contextlib.closing(feed):
            self._require_data(feed)
            step = self._train(first, last, feed)
            self._require_data(feed)
            self.records.require_written()
        return step

    def _train(self, first: int, last: int, feed: BatchFeed) -> int:
        self.records.begin(first)
        self.step_metrics.begin()
        step, saved, stopped = first, first, False
        while step < last and not stopped:
            stopped = self._update(step, feed)
            step += 1
            self.engine.require_updates(self.config.most_skipped_updates)
            if step == last or stopped or step % self.config.log_every == 0:
                self._log(last)
            if step == last or due(step, self.config.validate_every):
                self._validate(step)
            if not stopped and step < last and due(step, self.config.checkpoint_every):
                self._checkpoint(step, last)
                saved = step
        if saved != step:
            self._checkpoint(step, last)
        return step

    def _update(self, step: int, feed: BatchFeed) -> bool:
        """Do the update after the first `step`; return whether any rank was asked to stop."""
        PROGRESS.begin(f"in update {step + 1}", update=step + 1)
        seed_step(self.seed, step, self.engine.rank)
        batches = feed.take()
        learning_rate = self.engine.learning_rate()
        predicted = None
        if self.data.discard_smallest:
            batches, predicted = without_smallest_losses(self.engine, batches, self.data.discard_smallest)
        loss, totals = accumulate_step(self.engine, batches, self._asked_to_stop(feed))
        self.step_metrics.add(
            Update(
                step=step + 1,
                phase=self.data.phase,
                plan=self.data.plan,
                learning_rate=learning_rate,
                loss=loss,
                masked_tokens=int(totals[0]),
                predicted_tokens=predicted,
                data_wait=feed.wait_seconds,
            )
        )
        return bool(totals[1] > 0)

    def _asked_to_stop(self, feed: BatchFeed) -> bool:
        return self.stop_requested() or feed.failure is not None or self.records.failure is not None

    def _log(self, last: int) -> None:
        self.records.updates(self.step_metrics.fetch(), last)

    def _validate(self, step: int) -> None:
        with self.step_metrics.not_training(), self.records.stage("validation"):
            loss, accuracy = validate(self.engine, self.data.validation_batches)
        self.records.validation(step, loss, accuracy, self.data.unigram_entropy)

    def _checkpoint(self, step: int, last: int) -> None:
        """Write a checkpoint, of a state that can be continued only."""
        self._log(last)  # raises if a loss since the last log was not finite
        with self.step_metrics.not_training(), self.records.stage("checkpoints"):
            require_sound_weights(self.engine, self.data, step)
            PROGRESS.begin(f"while writing the checkpoint of step {step}")
            self.checkpoint(step)

    def _require_data(self, feed: BatchFeed) -> None:
        """Raise on all ranks if one of them cannot read the data of its next step."""
        broken = self.engine.sum_over_ranks(torch.tensor([float(feed.failure is not None)]))
        if broken.item():
            raise TrainingFailure("; ".join(collect_failures(feed.failure)))


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
