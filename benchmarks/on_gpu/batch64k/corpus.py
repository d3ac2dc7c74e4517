"""The text of the recipe, masked once and kept on the device: every run sees the same batches in the same order."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.data.masking import MaskedBatch
from trustratio.recipes.data.prepared import PreparedData
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.rules.global_batch import BatchPlan

__all__ = ["Corpus"]


class Corpus:
    """Micro-batches of updates, and of validation, on a device.

    Attributes:
        data: the prepared text.
        updates: micro-batches of each update.
        validation: micro-batches of held-out text.
    """

    def __init__(self, data: PreparedData, config: RecipeConfig, count: int, device: torch.device) -> None:
        """Mask the text of so many updates; numpy lets several threads do that at once."""
        self.data = data
        plan = BatchPlan(config.training.micro_batch, config.training.global_batch // config.training.micro_batch, 1)
        training, held_out = (
            MaskedRows(data.rows(part), data.vocabulary(), config.data.mask_probability, config.training.seed)
            for part in ("train", "validation")
        )

        def update(step: int) -> list[MaskedBatch]:
            return [batch.to(device) for batch in training.step_batches(step, plan, 0)]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            self.updates = list(threads.map(update, range(count)))
        rows = min(plan.micro, config.data.validation_sequences)
        batches = held_out.validation_batches(rows, 0, 1, config.data.validation_sequences)
        self.validation = [batch.to(device) for batch in batches]

    def of_update(self, number: int, together: int) -> list[MaskedBatch]:
        """The micro-batches of update `number`, counted from 0, of batches `together` times as large."""
        begin = number * together
        return [batch for update in self.updates[begin : begin + together] for batch in update]

    def describe(self) -> dict[str, Any]:
        """What there is of it."""
        return {
            "training_sequences": self.data.train_rows,
            "vocabulary": self.data.vocabulary_size,
            "unigram_entropy": self.data.unigram_entropy,
        }
