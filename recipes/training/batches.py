"""Where a run is in its data, and how large its next update is: the same, growing in a warm-up, or by the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trustratio.optimizers.noise_scale import NoiseScale

from ..common.errors import RecipeError
from ..common.files import write_json
from ..configuration.batch_growth import growths_of
from ..configuration.config import RecipeConfig
from ..configuration.phases import Phase
from ..data.feed import BatchFeed
from ..data.masking import MaskedBatch
from ..rules.global_batch import BatchPlan
from ..rules.noise_batch import BatchFromNoise
from .checks import CheckedRun
from .engines import Observed
from .growth_state import GROWTH, growth_state
from .phase_data import PhaseData


class Batches:
    """The batches of a run's updates, one after the other: within a phase all have the same size.

    Attributes:
        phase: of the next update, or of the last one until `enter_phase`.
        step: updates done in all.
        last: updates after which the run ends, at the latest.
    """

    def __init__(self, phases: Sequence[Phase], plans: Sequence[BatchPlan], first: int, last: int) -> None:
        """Go on after update `first`.

        Args:
            phases: of the run.
            plans: batch division of each.
            first: updates done.
            last: updates to end after.
        """
        self.phases, self.plans, self.step, self.last = phases, plans, first, last
        self.phase = phases[0]
        self.enter_phase()

    @property
    def plan(self) -> BatchPlan:
        """Batch division of the next update."""
        return self.plans[self.phase.number - 1]

    @property
    def read(self) -> int:
        """Sequences of the phase that were read."""
        return (self.step - self.phase.first) * self.plan.sequences

    @property
    def sequences(self) -> int:
        """Sequences that were read since the beginning of the run."""
        return self.phase.sequences_before + self.read

    @property
    def position(self) -> float | None:
        """Where the learning-rate schedule is, in updates of the phases' global batches; None: it counts itself."""
        return None

    @property
    def at_border(self) -> bool:
        """Whether the next update is the first one of a second phase."""
        return self.phase.number > 1 and self.read == 0

    @property
    def phase_is_over(self) -> bool:
        """Whether nothing is left to do of the phase, or of the run."""
        return self.read >= self.phase.sequences or self.step >= self.last

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do of the run."""
        return self.phase_is_over and (self.phase is self.phases[-1] or self.step >= self.last)

    @property
    def expected_last(self) -> int:
        """After how many updates the run will probably end."""
        return self.last

    def enter_phase(self) -> None:
        """Go over to the phase of the next update, which is this one unless it is over."""
        while self.read >= self.phase.sequences and self.phase is not self.phases[-1]:
            self._enter(self.phases[self.phase.number])

    def _enter(self, phase: Phase) -> None:
        self.phase = phase

    def feed(self, data: PhaseData, rank: int, device: torch.device) -> BatchFeed:
        """Return what makes a rank's micro-batches of the phase from here on."""
        return data.feed(self.step, min(self.phase.last, self.last), rank, device)

    def take(self, feed: BatchFeed) -> list[MaskedBatch]:
        """Return a rank's micro-batches of the next update."""
        return feed.take()

    def advance(self) -> None:
        """Take note that the next update was done."""
        self.step += 1

    @property
    def decides(self) -> bool:
        """Whether the next batch depends on measurements that `note` has not been given yet."""
        return False

    def note(self, records: Sequence[dict[str, Any]], engine: Observed) -> str:
        """Take note of what was measured of updates (collective); return a line on what follows from it, or ""."""
        return ""

    def save(self, checkpoint: Path, engine: Observed) -> None:
        """Write into a checkpoint what its name does not say, on the first rank."""


class GrowingBatches(Batches):
    """Batches that grow; see `batch_growth` for the rules. A subclass says how large the next one is."""

    _read = 0

    @property
    def batch(self) -> int:
        """Sequences of the next update, unless fewer are left of the phase."""
        raise NotImplementedError(f"{type(self).__name__} must define batch: the sequences of the next update")

    @property
    def most_next(self) -> int:
        """The most sequences that the update after the next one may have."""
        raise NotImplementedError(f"{type(self).__name__} must define most_next: the most that the one after may have")

    @property
    def unit(self) -> int:
        """Sequences of one micro-batch on every rank."""
        smallest = self.plans[self.phase.number - 1]
        return smallest.micro * smallest.ranks

    @property
    def plan(self) -> BatchPlan:
        """Batch division of the next update; the last one of a phase takes what is left."""
        smallest = self.plans[self.phase.number - 1]
        sequences = min(self.batch, self.phase.sequences - self._read)
        return BatchPlan(smallest.micro, sequences // self.unit, smallest.ranks)

    @property
    def read(self) -> int:
        """Sequences of the phase that were read."""
        return self._read

    @property
    def position(self) -> float:
        """Where the schedule is: after as many updates as these sequences make with the phases' global batches."""
        return self.phase.first + self._read / self.phase.global_batch

    def _enter(self, phase: Phase) -> None:
        super()._enter(phase)
        self._read = 0

    def feed(self, data: PhaseData, rank: int, device: torch.device) -> BatchFeed:
        """Return what makes a rank's micro-batches of the phase from here on, round by round."""
        feed = data.rounds(self._read // self.unit, self.phase.sequences // self.unit, rank, device)
        feed.look_ahead(self.plan.accumulation)
        return feed

    def take(self, feed: BatchFeed) -> list[MaskedBatch]:
        """Return a rank's micro-batches of the next update; those that the one after it may take are known then."""
        return feed.take(self.plan.accumulation, ahead=self.most_next // self.unit)

    def advance(self) -> None:
        """Take note that the next update was done."""
        self._read += self.plan.sequences
        super().advance()

    def save(self, checkpoint: Path, engine: Observed) -> None:
        """Write phase, position and what the rule needs, on the first rank; they are the same on all."""
        if engine.rank == 0:
            write_json(checkpoint / GROWTH, {"phase": self.phase.number, "read": self._read, **self._rule_state()})

    def _rule_state(self) -> dict[str, Any]:
        return {}

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            RecipeError: it has no such state, or these ranks cannot go on at its position.
        """
        self._load(checkpoint)
        if self._read % self.unit:
            raise RecipeError(
                f"{checkpoint} was written after {self._read} sequences, which {self.plan.micro} x {self.plan.ranks} "
                "does not divide: continue it with the micro-batch and ranks that wrote it"
            )
        self.enter_phase()

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        state = growth_state(checkpoint)
        self.phase = self.phases[min(state["phase"], len(self.phases)) - 1]
        self._read = state["read"]
        return state


class WarmedUpBatches(GrowingBatches):
    """Batches of which the first ones are smaller, by what was read alone."""

    def __init__(
        self, config: RecipeConfig, phases: Sequence[Phase], plans: Sequence[BatchPlan], first: int, last: int
    ) -> None:
        """Begin with the smallest batch; `load` goes on from a checkpoint.

        Args:
            config: of the run.
            phases: of it.
            plans: division of each phase's smallest batch.
            first: updates done.
            last: updates to end after.
        """
        self.schedules = [growth.schedule() for growth in growths_of(config)]
        super().__init__(phases, plans, first, last)

    @property
    def batch(self) -> int:
        """Sequences of the next update, unless fewer are left of the phase."""
        return self._batch_at(self._read)

    @property
    def most_next(self) -> int:
        """The sequences of the update after the next one."""
        return self._batch_at(self._read + self.plan.sequences)

    def _batch_at(self, read: int) -> int:
        return self.schedules[self.phase.number - 1].batch_at(read)


class NoiseBatches(GrowingBatches):
    """Batches that follow the gradient noise scale."""

    def __init__(
        self, config: RecipeConfig, phases: Sequence[Phase], plans: Sequence[BatchPlan], first: int, last: int
    ) -> None:
        """Begin with the smallest batch of the first phase; `load` goes on from a checkpoint.

        Args:
            config: of the run.
            phases: of it.
            plans: division of each phase's smallest batch.
            first: updates done.
            last: updates to end after, at the latest.
        """
        self.rules = [growth.rule(config) for growth in growths_of(config)]
        self._pending = 0
        super().__init__(phases, plans, first, last)

    @property
    def rule(self) -> BatchFromNoise:
        """What chooses the batches of the phase."""
        return self.rules[self.phase.number - 1]

    @property
    def batch(self) -> int:
        """Sequences of the next update, unless fewer are left of the phase."""
        return self.rule.batch

    @property
    def most_next(self) -> int:
        """The batch after one more doubling."""
        return self.rule.most_next

    @property
    def expected_last(self) -> int:
        """After how many updates the run ends if no batch grows any more."""
        expected = self.step + math.ceil((self.phase.sequences - self._read) / self.rule.batch)
        for phase, rule in zip(self.phases, self.rules, strict=True):
            if phase.number > self.phase.number:
                expected += math.ceil(phase.sequences / rule.batch_after(self.rule.doublings))
        return min(expected, self.last)

    def _enter(self, phase: Phase) -> None:
        doublings = self.rule.doublings
        super()._enter(phase)
        self._pending = 0
        self.rule.doublings = doublings

    def advance(self) -> None:
        """Take note that the next update was done."""
        super().advance()
        self._pending += 1

    @property
    def decides(self) -> bool:
        """Whether the next batch depends on measurements that `note` has not been given yet."""
        return self._pending > 0 and (self.rule.updates + self._pending) % self.rule.every == 0

    def note(self, records: Sequence[dict[str, Any]], engine: Observed) -> str:
        """Average the noise of the updates; what the first rank measured counts on all."""
        before = self.rule.batch
        for noise in _of_first_rank(records, engine):
            self.rule.update(noise)
        self._pending = 0
        if self.rule.batch == before:
            return ""
        return (
            f"step {self.step}: the gradient noise scale is {self.rule.noise_scale:,.0f} sequences; the batch grows "
            f"from {before:,} to {self.rule.batch:,}"
        )

    def _rule_state(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict()}

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        state = super()._load(checkpoint)
        try:
            self.rule.load_state_dict(state.get("rule", {}))
        except ValueError as error:
            raise RecipeError(f"cannot go on with the batch of {checkpoint / GROWTH}: {error}") from error
        return state


def _of_first_rank(records: Sequence[dict[str, Any]], engine: Observed) -> list[NoiseScale]:
    """Return the noise that the first rank measured of each update, on all ranks (collective).

    All measure the same, to the last bit where their processors are alike; their batches must be the same anyway.
    """
    if not records:
        return []
    own = [[record.get(f"gradient_{name}", math.nan) for name in ("signal", "noise")] for record in records]
    first = own if engine.rank == 0 else [[0.0, 0.0]] * len(own)
    return [
        NoiseScale(*pair)
        for pair in engine.sum_over_ranks(torch.tensor(first, dtype=torch.float64, device="cpu")).tolist()
    ]


def batches_of(run: CheckedRun) -> Batches:
    """Return where a run begins, or goes on.

    Raises:
        RecipeError: the checkpoint to go on from does not say how large its batch has grown.
    """
    if not growths_of(run.config):
        return Batches(run.phases, run.plans, run.first, run.last)
    kind = NoiseBatches if run.config.run.batch_from_noise else WarmedUpBatches
    batches = kind(run.config, run.phases, run.plans, run.first, run.last)
    if run.invocation.resume is not None:
        batches.load(run.invocation.resume)
    return batches
