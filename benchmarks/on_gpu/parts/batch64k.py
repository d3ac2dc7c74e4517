"""True batches of 65,536 and 131,072 sequences: LAMB, LANS and AdamW at three rates each, in one process."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch.distributed as dist

from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.comparison.rate_grids import grid_around
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides, set_field
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.model.optimizer import starting_rates
from trustratio.recipes.planning.memory import model_size
from trustratio.recipes.planning.phase_plan import Machine, plan_phase
from trustratio.recipes.training.quiet import quieten
from trustratio.recipes.training.ranks import start

from ..batch64k.corpus import Corpus
from ..batch64k.page import best_runs, is_good, tables, verdict
from ..batch64k.runs import Trainer
from ..batch64k.settings import OPTIMIZERS, RATES, REAL, TOY, Settings, scaled_rate, updates_that_fit
from ..part import Failed, Part
from ..texts import toy_text
from ..throughput.engine import memory_for

__all__ = ["run", "tables"]

RESERVE = 5.0
"""Seconds before the limit at which a run ends, with its validation."""

BATCHES_SHARE = 0.4
"""Of the free memory: what a micro-batch may be planned to take, beside the data of all runs."""


def run(part: Part) -> str:
    """Train all runs that fit, and return the line for the summary.

    Raises:
        Failed: With that line, if a run raised an error, or none came to its end.
    """
    quieten()
    start()
    try:
        train_all(part, TOY if part.rehearse else REAL)
    finally:
        dist.destroy_process_group()
    if not is_good(part.found):
        raise Failed(verdict(part.found))
    return verdict(part.found)


def train_all(part: Part, settings: Settings) -> None:
    """Prepare the data, train the grid, then twice the batch at the best rates."""
    config = configuration(settings, part)
    data = prepare(config.data, Reporter())
    trainer = Trainer(config, data, settings.backend)
    trainer.corpus = Corpus(data, config, settings.updates, trainer.device)
    part.record(
        toy=part.rehearse,
        **trainer.corpus.describe(),
        model=f"BERT {config.model.layers} x {config.model.hidden}",
        sequence_length=config.data.sequence_length,
        micro_batch=config.training.micro_batch,
        prepared_seconds=round(part.limit - part.left(), 1),
    )
    seconds = trainer.seconds_of_an_update("lamb", config.optimizer.lr)
    updates = updates_that_fit(0.9 * (part.left() - RESERVE), seconds, settings.updates)
    part.record(update_seconds=seconds, updates=updates)
    runs = Runs(part, trainer, seconds)
    grids = {name: grid_around(starting_rates()[name], RATES) for name in OPTIMIZERS}
    for place in (1, 0, 2):  # the rate in the middle first
        for name, rates in grids.items():
            runs.train(name, rates[place], updates, 1)
    for best in best_runs(runs.done):
        runs.train(best["optimizer"], scaled_rate(best["lr"]), updates // 2, 2)


def configuration(settings: Settings, part: Part) -> RecipeConfig:
    """The recipe's configuration of a run at the smaller batch, with the micro-batch that its plan finds."""
    config = apply_overrides(get_preset(settings.preset), settings.overrides)
    if part.rehearse:
        config = set_field(config, "data", "sources", toy_text())
    training = dataclasses.replace(
        config.training,
        global_batch=settings.batch,
        micro_batch=settings.micro_batch,
        steps=settings.updates,
        precision="bf16",
        zero_stage=0,
    )
    config = dataclasses.replace(config, training=training)
    (phase,) = phases_of(config)
    machine = Machine(memory=BATCHES_SHARE * memory_for(part.device))
    planned = plan_phase(model_size(config), config, phase, 1, machine).micro
    micro = max(1, min(planned, settings.micro_batch))
    return dataclasses.replace(config, training=dataclasses.replace(training, micro_batch=micro))


class Runs:
    """The runs that were done, each on disk as soon as there is something to tell of it."""

    def __init__(self, part: Part, trainer: Trainer, seconds: float) -> None:
        self.part, self.trainer, self.seconds = part, trainer, seconds
        self.done: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def train(self, name: str, rate: float, updates: int, together: int) -> None:
        """Do one run, if there is time for it; one that fails takes nothing from the next."""
        called = f"{name} {rate:g} at {together * self.trainer.config.training.global_batch:,}"
        if not self.part.rehearse and self.part.left() < RESERVE + updates * together * self.seconds:
            self.skipped.append(called)
            self.part.record(skipped=self.skipped)
            return
        began = time.monotonic()

        def note(found: dict[str, Any]) -> None:
            self.part.record(runs=[*self.done, found])

        def time_is_over() -> bool:
            return self.part.left() < RESERVE

        try:
            found = self.trainer.train(name, rate, max(1, updates), together, note, time_is_over)
        except Exception as error:  # of the device, or the optimizer
            self.failed.append(f"{called}: {type(error).__name__}: {error}".splitlines()[0][:200])
            self.part.record(runs=self.done, failed=self.failed)
            return
        self.done.append(found)
        self.seconds = max(self.seconds, (time.monotonic() - began) / (max(1, updates) * together))
