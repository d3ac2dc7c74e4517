"""A phase with its data: the training rows and validation micro-batches that one rank reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..configuration.phases import Phase
from ..data.feed import BatchFeed, default_workers
from ..data.given_masks import AS_GIVEN
from ..data.masking import MaskedBatch
from ..data.prepared import PreparedData
from ..data.rows import MaskedRows
from ..data.shards import TokenRows
from ..rules.global_batch import BatchPlan
from .checks import CheckedRun
from .ranks import rank, ranks_on_machine


@dataclass(frozen=True)
class PhaseData:
    """What a phase trains on and is validated on.

    Attributes:
        phase: its updates and their sequences.
        plan: batch division of each update.
        training_rows: of which each update takes the next global batch.
        validation_batches: this rank's micro-batches, the same every time.
        unigram_entropy: in nats; the loss of guessing by the tokens' frequencies alone.
        discard_smallest: share of an update's predictions, those with the smallest losses, that its loss leaves out.
        workers: processes that make the batches of this rank ahead of time; 0: made when they are needed.
    """

    phase: Phase
    plan: BatchPlan
    training_rows: MaskedRows
    validation_batches: list[MaskedBatch]
    unigram_entropy: float
    workers: int = 0
    discard_smallest: float = 0.0

    def feed(self, first: int, last: int, rank: int, device: torch.device) -> BatchFeed:
        """Return a rank's micro-batches of the run's updates first + 1 .. last, all of them in this phase."""
        return self._feed(self.plan, first - self.phase.first, last - self.phase.first, rank, device)

    def rounds(self, first: int, last: int, rank: int, device: torch.device) -> BatchFeed:
        """Return a rank's micro-batches one by one: the phase's rounds first + 1 .. last of one on every rank."""
        return self._feed(dataclasses.replace(self.plan, accumulation=1), first, last, rank, device)

    def _feed(self, plan: BatchPlan, first: int, last: int, rank: int, device: torch.device) -> BatchFeed:
        return BatchFeed(self.training_rows, plan, rank, first, last, self.workers, pin_memory=device.type == "cuda")


def phases_with_data(run: CheckedRun, data: Sequence[PreparedData], device: torch.device) -> list[PhaseData]:
    """Return the run's phases, each with its own of the prepared `data`, as this rank reads them."""
    config = run.config
    workers = default_workers(device, ranks_on_machine()) if config.data.workers is None else config.data.workers
    phases = []
    for phase, plan, prepared in zip(run.phases, run.plans, data, strict=True):
        vocabulary = prepared.vocabulary()
        training_rows, validation_rows = (
            MaskedRows(
                prepared.rows(part),
                vocabulary,
                config.data.mask_probability,
                config.training.seed,
                as_given=config.data.masks == AS_GIVEN,
            )
            for part in ("train", "validation")
        )
        if isinstance(training_rows.rows, TokenRows):
            training_rows.rows.pin()
        validation_batches = validation_rows.validation_batches(
            plan.micro, rank(), plan.ranks, config.data.validation_sequences
        )
        phases.append(
            PhaseData(
                phase,
                plan,
                training_rows,
                validation_batches,
                prepared.unigram_entropy,
                workers,
                config.data.discard_smallest,
            )
        )
    return phases
