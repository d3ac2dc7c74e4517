"""The recipe's engine, its micro-batch by the plan, and batches of random tokens: no data have to be prepared."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from benchmarks.machine import available_memory
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import with_model_size
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.data.masking import MaskedBatch
from trustratio.recipes.model.build import build_parts
from trustratio.recipes.model.compiling import compile_regions
from trustratio.recipes.model.flops import ModelFlops
from trustratio.recipes.model.masked_language_model import padded_vocabulary
from trustratio.recipes.planning.memory import model_size
from trustratio.recipes.planning.phase_plan import Machine, PhasePlan, plan_phase
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.deepspeed_settings import merge
from trustratio.recipes.training.engines import TrainingEngine
from trustratio.recipes.training.launchers import DeepSpeedLauncher

from .cases import Case, Sizes

__all__ = ["ACCUMULATION", "Bench", "build", "random_batch"]

PRESET = "lamb-64k-32k"
ACCUMULATION = 2
"""Micro-batches per update: fewer than a real one has, so that the optimizer's share is larger here."""

_MOST_BATCH = 8192


@dataclass
class Bench:
    """A model's engine, compiled; `eagerly` runs it without.

    Attributes:
        config: of the recipe.
        sizes: of everything.
        engine: DeepSpeed's, ZeRO-1, bf16.
    """

    config: RecipeConfig
    sizes: Sizes
    engine: TrainingEngine

    def plan(self, length: int, memory: float) -> PhasePlan:
        """The recipe's plan: the largest power of two that fits, at this length, into so much memory."""
        (first, *_) = phases_of(self.config)
        batch = min(_MOST_BATCH, self.sizes.most_sequences)
        phase = dataclasses.replace(first, sequence_length=length, global_batch=batch)
        size = model_size(self.config, self.sizes.vocabulary)
        return plan_phase(size, self.config, phase, 1, Machine(memory=memory))

    def flops(self, batches: list[MaskedBatch]) -> float:
        """Of an update over these micro-batches, by the recipe's own count."""
        tokens, length = sum(batch.input_ids.numel() for batch in batches), batches[0].input_ids.shape[1]
        predicted = sum(len(batch.labels) for batch in batches)
        rows = padded_vocabulary(self.sizes.vocabulary)
        return ModelFlops.of(self.config.model, rows).update(tokens, predicted, length)

    def batches(self, micro: int, length: int) -> list[MaskedBatch]:
        """The micro-batches of an update, on the device."""
        share = self.config.data.mask_probability
        return [
            random_batch(micro, length, self.sizes.vocabulary, share, self.engine.device) for _ in range(ACCUMULATION)
        ]


def build(case: Case, sizes: Sizes) -> Bench:
    """Build the engine of a case's model, with the values of the preset; the process group is there."""
    config = with_model_size(get_preset(PRESET), sizes.models[case.size])
    training = dataclasses.replace(config.training, zero_stage=1, precision="bf16")
    config = dataclasses.replace(config, training=training)
    parts = build_parts(config, sizes.vocabulary)
    compile_regions(parts.model, sizes.backend)
    plan = BatchPlan(1, ACCUMULATION, 1)
    settings = merge({}, plan, 1, "bf16", training.gradient_clipping, elementwise=False)
    return Bench(config, sizes, DeepSpeedLauncher().engine(parts, training, plan, settings))


def random_batch(micro: int, length: int, vocabulary: int, share: float, device: torch.device) -> MaskedBatch:
    """Random tokens, of which a share is predicted: as many as chance has it, as in training."""
    tokens = torch.randint(5, vocabulary, (micro, length), device=device)
    positions = (torch.rand(micro * length, device=device) < share).nonzero().reshape(-1)
    return MaskedBatch(tokens, positions, tokens.reshape(-1)[positions])


def compiled_or_not(compiled: bool) -> AbstractContextManager[object]:
    """Run what was compiled as it was compiled, or as if it were not."""
    return contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager")


def memory_for(device: str) -> int:
    """Bytes that this process has or could have."""
    return available_memory(device) + (torch.cuda.memory_reserved() if device == "cuda" else 0)
