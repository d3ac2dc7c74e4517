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
from ..rules.global_batch import BatchPlan
from .batches import Batches
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
    engine: TrainingEngine, batches: list[MaskedBatch], stop_requested: bool, twice: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one update: the gradient of sum(cross-entropy) / (masked tokens of the whole global batch).

    Args:
        engine: wrapped model and optimizer.
        batches: this rank's micro-batches of the step.
        stop_requested: this rank was asked to stop.
        twice: the engine wants a second pass over the micro-batches, of which the first one alone is told.

    Returns:
        This rank's summed cross-entropy over the number of masked tokens of the global batch (its sum over the
        ranks is the loss), and [masked tokens, ranks asked to stop], both summed over all ranks, on the host.
    """
    masked = sum(len(batch.labels) for batch in batches)
    # The stop flags ride along with the normaliser, so all ranks stop after the same step at no extra cost.
    totals = engine.sum_over_ranks(
        torch.tensor([float(masked), float(stop_requested)], dtype=torch.float64, device="cpu")
    )
    # A copy queued here lets the host read the flags at the end without waiting for the step itself.
    totals_on_host = totals.to("cpu", non_blocking=True)
    arrived = _mark(engine.device)
    normaliser = totals[0].clamp(min=1.0).float()
    loss_sum = _pass(engine, batches, normaliser)
    if twice:
        with engine.second_pass():
            _pass(engine, batches, normaliser)
    if arrived is not None:
        arrived.synchronize()
    return loss_sum, totals_on_host


def _pass(engine: TrainingEngine, batches: list[MaskedBatch], normaliser: torch.Tensor) -> torch.Tensor:
    """Run all micro-batches, forward and backward; return this rank's loss."""
    loss_sum = torch.zeros((), device=engine.device)
    for number, batch in enumerate(batches, start=1):
        engine.begin_micro_batch(last=number == len(batches))
        loss, _ = engine.loss(batch.to(engine.device))
        loss = loss / normaliser
        loss_sum += loss.detach()
        engine.backward(loss)
        engine.step()
        PROGRESS.move()
    return loss_sum


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
    """Trains to the end of a phase and reports; every rank runs it in step.

    Attributes:
        engine: wrapped model and optimizer.
        batches: where the run is, and how large its updates are.
        data: the phase and its data.
        config: how often to log, validate and write checkpoints.
        seed: of the run.
        step_metrics: measures every update.
        records: takes what was measured.
        checkpoint: writes a checkpoint of the given step (collective).
        stop_requested: asks whether this rank should stop.
    """

    engine: TrainingEngine
    batches: Batches
    data: PhaseData
    config: RunConfig
    seed: int
    step_metrics: StepMetrics
    records: Records
    checkpoint: Callable[[int], Any]
    stop_requested: Callable[[], bool]
    _plan: BatchPlan | None = None

    def run(self) -> bool:
        """Do the updates that are left of the phase; return whether a request to stop ended it before."""
        feed = self.batches.feed(self.data, self.engine.rank, self.engine.device)
        with contextlib.closing(feed):
            self._require_data(feed)
            stopped = self._train(feed)
            self._require_data(feed)
            self.records.require_written()
        return stopped

    def _train(self, feed: BatchFeed) -> bool:
        batches, saved, stopped = self.batches, self.batches.step, False
        self.records.begin(batches.step)
        self.step_metrics.begin()
        while not batches.phase_is_over and not stopped:
            stopped = self._update(feed)
            step, over = batches.step, batches.phase_is_over
            self.engine.require_updates(self.config.most_skipped_updates)
            if over or stopped or step % self.config.log_every == 0 or batches.decides:
                self._log()
            if over or due(step, self.config.validate_every):
                self._validate(step)
            if not stopped and not over and due(step, self.config.checkpoint_every):
                self._checkpoint(step)
                saved = step
        if saved != batches.step:
            self._checkpoint(batches.step)
        return stopped

    def _update(self, feed: BatchFeed) -> bool:
        """Do the next update; return whether any rank was asked to stop."""
        batches, plan = self.batches, self.batches.plan
        PROGRESS.begin(f"in update {batches.step + 1}", update=batches.step + 1)
        seed_step(self.seed, batches.step, self.engine.rank)
        self._set_out(plan)
        micro_batches = batches.take(feed)
        learning_rate = self.engine.learning_rate()
        predicted = None
        if self.data.discard_smallest:
            share = self.data.discard_smallest
            micro_batches, predicted = without_smallest_losses(self.engine, micro_batches, share)
        asked, twice = self._asked_to_stop(feed), self.engine.wants_second_pass()
        loss, totals = accumulate_step(self.engine, micro_batches, asked, twice)
        batches.advance()
        self.step_metrics.add(
            Update(
                step=batches.step,
                phase=self.data.phase,
                plan=plan,
                learning_rate=learning_rate,
                loss=loss,
                masked_tokens=int(totals[0]),
                predicted_tokens=predicted,
                data_wait=feed.wait_seconds,
                sequences=batches.sequences,
                passes=1 + twice,
            )
        )
        return bool(totals[1] > 0)

    def _set_out(self, plan: BatchPlan) -> None:
        """Tell the engine of the next update's batch, if it is another, and of its learning rate."""
        if plan != self._plan:
            self.engine.set_batch_plan(plan)
            self._plan = plan
        if self.batches.position is not None:
            self.engine.continue_schedule(self.batches.position)

    def _asked_to_stop(self, feed: BatchFeed) -> bool:
        return self.stop_requested() or feed.failure is not None or self.records.failure is not None

    def _log(self) -> None:
        fetched = self.step_metrics.fetch()
        self.records.updates(fetched, self.batches.expected_last)
        self.records.say(self.batches.note(fetched, self.engine))

    def _validate(self, step: int) -> None:
        with self.step_metrics.not_training(), self.records.stage("validation"):
            loss, accuracy = validate(self.engine, self.data.validation_batches)
        self.records.validation(step, loss, accuracy, self.data.unigram_entropy)

    def _checkpoint(self, step: int) -> None:
        """Write a checkpoint, of a state that can be continued only."""
        self._log()  # raises if a loss since the last log was not finite
        with self.step_metrics.not_training(), self.records.stage("checkpoints"):
            require_sound_weights(self.engine, self.data, step)
            PROGRESS.begin(f"while writing the checkpoint of step {step}")
            self.checkpoint(step)

    def _require_data(self, feed: BatchFeed) -> None:
        """Raise on all ranks if one of them cannot read the data of its next step."""
        broken = self.engine.sum_over_ranks(torch.tensor([float(feed.failure is not None)], device="cpu"))
        if broken.item():
            raise TrainingFailure("; ".join(collect_failures(feed.failure)))


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
