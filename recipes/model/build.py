"""Model, optimizer and schedule of a configuration, for any wrapper: what every entry starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from ..configuration.config import RecipeConfig
from ..configuration.phases import PhasedSchedule, phased_schedule
from .attention import attention_of
from .compiling import compile_regions
from .masked_language_model import MaskedLanguageModel, build_model, first_rows, padded_vocabulary
from .optimizer import build_optimizer
from .sixteen_bits import storage_options


@dataclass(frozen=True)
class RecipeParts:
    """What is trained, before any wrapper.

    Attributes:
        model: on the CPU, with the weights that the seed or `model.initial_weights` decides; in fp32, or with
            `training.master` in bf16.
        optimizer: over the model's named parameters, in two groups (with and without weight decay).
        schedule: puts the learning-rate schedule of all phases on an optimizer; step it once per update.
    """

    model: MaskedLanguageModel
    optimizer: Optimizer
    schedule: Callable[[Optimizer], PhasedSchedule]


def outline(config: RecipeConfig, vocabulary_size: int | None = None) -> tuple[MaskedLanguageModel, Optimizer]:
    """Build model and optimizer without memory for their tensors: to measure them, or to see whether they can be built.

    Args:
        config: resolved.
        vocabulary_size: tokens; None: the configuration's.

    Raises:
        RecipeError: an unknown optimizer, or options that it refuses or that contradict each other.
    """
    storage = storage_options(config)
    shape = dataclasses.replace(config.model, initial_weights=None)
    with torch.device("meta"):
        model = build_model(shape, padded_vocabulary(vocabulary_size or config.data.vocabulary))
    return _in_its_precision(model, config), build_optimizer(config.optimizer, model, storage)


def build_parts(
    config: RecipeConfig,
    vocabulary_size: int,
    special_tokens: Mapping[str, int | None] | None = None,
    rows: int | None = None,
) -> RecipeParts:
    """Build model, optimizer and schedule of a configuration; equal on every rank and for every launcher.

    Args:
        config: resolved and checked.
        vocabulary_size: tokens of the prepared data.
        special_tokens: ids of the data's tokenizer, see `PreparedData.special_tokens`; None: left open.
        rows: of the embedding table; None: `first_rows`.

    Raises:
        RecipeError: options that the optimizer refuses, or initial weights of another shape.
    """
    torch.manual_seed(config.training.seed)
    rows = rows or first_rows(config.model, vocabulary_size)
    model = build_model(config.model, rows, special_tokens, attention_of(config))
    if config.training.activation_checkpointing:
        model.checkpoint_activations()
    optimizer = build_optimizer(config.optimizer, _in_its_precision(model, config), storage_options(config))
    if config.training.compile:
        compile_regions(model)
    return RecipeParts(model, optimizer, phased_schedule(config))


def _in_its_precision(model: MaskedLanguageModel, config: RecipeConfig) -> MaskedLanguageModel:
    """Cast the model's weights, in place, to what they are trained in where nobody keeps others."""
    return model if config.training.master is None else model.bfloat16()
