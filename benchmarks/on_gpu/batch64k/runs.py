"""Many runs of one model in one process: weights begin the same, optimizer and schedule are each run's own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.timing import synchronize
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.phases import phased_schedule
from trustratio.recipes.data.prepared import PreparedData
from trustratio.recipes.model.build import build_parts
from trustratio.recipes.model.compiling import compile_regions
from trustratio.recipes.model.optimizer import build_optimizer
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.engines import DataParallelTraining
from trustratio.recipes.training.launchers import AccelerateLauncher
from trustratio.recipes.training.loop import accumulate_step, seed_step, validate

from .corpus import Corpus

__all__ = ["Trainer"]

FETCH_EVERY = 10
"""Updates whose losses are brought from the device together."""


class Trainer:
    """Trains the same model again and again.

    Attributes:
        config: of the recipe; a run has another optimizer, rate, batch and number of updates.
        model: compiled, on its device, in bf16 autocast.
        device: where it is.
        corpus: what it is trained on; there before the first run.
    """

    corpus: Corpus

    def __init__(self, config: RecipeConfig, data: PreparedData, backend: str) -> None:
        """Build the model, as the recipe builds it under accelerate on one device without sharding."""
        self.config = config
        parts = build_parts(config, data.vocabulary_size, data.special_tokens())
        compile_regions(parts.model, backend)
        engine: Any = AccelerateLauncher({}).engine(parts, config.training, BatchPlan(1, 1, 1), None)
        self.wrap(engine.model, engine.device)

    def wrap(self, model: nn.Module, device: torch.device) -> None:
        """Take a model as accelerate wraps it, with the weights that runs begin with."""
        self.model, self.device = model, device
        self._initial = {name: value.clone() for name, value in model.state_dict().items()}

    def train(
        self,
        name: str,
        rate: float,
        updates: int,
        together: int,
        note: Callable[[dict[str, Any]], None] = lambda found: None,
        time_is_over: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Train from the first weights, and return the curve.

        Args:
            name: of the optimizer.
            rate: its highest.
            updates: of the run, which its schedule is made for.
            together: batches of the corpus that are one update's.
            note: is given what is known whenever losses were fetched.
            time_is_over: asked then; ends the run.
        """
        engine = self._engine(name, rate, updates, together)
        held: list[torch.Tensor] = []
        fetched: list[tuple[int, float]] = []
        found: dict[str, Any] = {"optimizer": name, "lr": rate, "losses": []}
        found["batch"] = together * self.config.training.global_batch
        found["asked_updates"] = updates
        synchronize()
        began = time.perf_counter()
        for number in range(updates):
            seed_step(self.config.training.seed, number, 0)
            held.append(accumulate_step(engine, self.corpus.of_update(number, together), stop_requested=False)[0])
            if len(held) == FETCH_EVERY or number == updates - 1:
                found["losses"] += torch.stack(held).tolist()  # waits for the device
                held.clear()
                fetched.append((len(found["losses"]), time.perf_counter() - began))
                found |= {"seconds": fetched[-1][1], "sequences_per_second": found["batch"] * _rate(fetched)}
                note(found)
                if time_is_over() or not math.isfinite(found["losses"][-1]):
                    break
        found["validation_loss"], found["validation_accuracy"] = validate(engine, self.corpus.validation)
        note(found)
        return found

    def seconds_of_an_update(self, name: str, rate: float) -> float:
        """Seconds of one, when everything is compiled; what validation needs is then, too."""
        engine = self._engine(name, rate, 4, 1)
        for number in range(4):
            if number == 2:
                synchronize()
                began = time.perf_counter()
            accumulate_step(engine, self.corpus.of_update(number % len(self.corpus.updates), 1), stop_requested=False)
        synchronize()
        seconds = (time.perf_counter() - began) / 2
        validate(engine, self.corpus.validation)
        return seconds

    def _engine(self, name: str, rate: float, updates: int, together: int) -> DataParallelTraining:
        self.model.load_state_dict(self._initial)
        self.model.train()
        optimizer = dataclasses.replace(self.config.optimizer, name=name, lr=rate)
        training = dataclasses.replace(
            self.config.training, steps=updates, global_batch=together * self.config.training.global_batch
        )
        config = dataclasses.replace(self.config, optimizer=optimizer, training=training)
        built = build_optimizer(optimizer, self.model)
        return DataParallelTraining(
            self.model, built, phased_schedule(config), self.device, config.training.gradient_clipping
        )


def _rate(fetched: list[tuple[int, float]]) -> float:
    """Updates per second from the first fetch on, since the optimizer finds its layers in the first update."""
    (first, began), (last, ended) = fetched[0], fetched[-1]
    return (last - first) / (ended - began) if len(fetched) > 1 else last / ended
