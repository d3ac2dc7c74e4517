"""Small BERTs of the recipe, trained with everything the same but how state and weights are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.sixteen_bits.variants import VARIANTS, Variant, rounding_to_nearest
from trustratio.optimizers import LAMB
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig, ModelConfig
from trustratio.recipes.data.masking import MaskedBatch
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.data.prepared import PreparedData
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.masked_language_model import build_model, padded_vocabulary
from trustratio.recipes.model.optimizer import parameter_groups
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.rules.schedules import warmup_polynomial

__all__ = ["OPTIMIZERS", "SEEDS", "TRAININGS", "Corpus", "Make", "Run", "Training", "runs", "state_bytes", "train"]

SEEDS = (1, 2, 3)
DECAY, CLIP, WARMUP = 0.01, 1.0, 0.1
SECOND_MOMENT = "exp_avg_sq"
Make = Callable[[Any, float], torch.optim.Optimizer]
"""From parameter groups and a learning rate to an optimizer."""


@dataclass(frozen=True)
class Training:
    """What is trained, and how long.

    Attributes:
        size: In the recipe's `MODEL_SIZES`.
        updates: Of `batch` sequences of `length` tokens each.
        rates: The highest learning rate, by optimizer; it is warmed up and falls to zero on a line.
    """

    size: str
    updates: int
    rates: dict[str, float]
    batch: int = 16
    length: int = 32
    vocabulary: int = 1024
    validation_sequences: int = 1024


TRAININGS = {
    "tiny": Training("tiny", 500, {"LAMB": 0.01, "AdamW": 0.002}),
    "mini": Training("mini", 120, {"LAMB": 0.005, "AdamW": 0.001}),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"LAMB": {}, "AdamW": {"adapt": False}}
"""Options of `LAMB`: without ratio it is AdamW."""


class Corpus:
    """The recipe's text, the documentation of the installed packages: tokenized once, and found again."""

    def __init__(self, training: Training):
        self.training = training
        config = DataConfig(vocabulary=training.vocabulary, sequence_length=training.length)
        self.data: PreparedData = prepare(config, Reporter(active=False))

    @property
    def unigram_entropy(self) -> float:
        """The loss, in nats, of guessing by the frequencies of tokens alone."""
        return self.data.unigram_entropy

    def update(self, number: int, seed: int) -> list[MaskedBatch]:
        """The batch of an update, the same for all variants."""
        return self._rows("train", seed).step_batches(number, BatchPlan(self.training.batch, 1, 1), 0)

    def validation(self) -> list[MaskedBatch]:
        """Held-out text, masked in the same way for all."""
        return self._rows("validation", 0).validation_batches(64, 0, 1, self.training.validation_sequences)

    def _rows(self, part: str, seed: int) -> MaskedRows:
        return MaskedRows(self.data.rows(part), self.data.vocabulary(), 0.15, seed)


@dataclass(frozen=True)
class Run:
    """One training run."""

    training: Training
    optimizer: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Its key among the results."""
        return f"{self.training.size}, {self.optimizer}, {self.variant}, seed {self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What it depends on; a finished run with the same is not done again."""
        return dataclasses.asdict(self.training)

    def carry_out(self, corpus: Corpus) -> dict[str, Any]:
        """Train; return plain numbers, see `train`."""
        variant = VARIANTS[self.variant]

        def make(groups: Any, lr: float) -> torch.optim.Optimizer:
            return LAMB(groups, lr, **OPTIMIZERS[self.optimizer], **variant.options())

        with rounding_to_nearest() if variant.is_nearest else contextlib.nullcontext():
            return train(corpus, make, self.training.rates[self.optimizer], self.seed, variant)


def runs(trainings: Iterable[Training], seeds: Iterable[int] = SEEDS) -> list[Run]:
    """All runs: every variant with a seed before the next seed."""
    return [
        Run(training, optimizer, variant, seed)
        for training in trainings
        for seed in seeds
        for optimizer in OPTIMIZERS
        for variant in VARIANTS
    ]


def train(corpus: Corpus, make: Make, rate: float, seed: int, variant: Variant) -> dict[str, Any]:
    """Train a model from random weights.

    All computes in bf16: under autocast where the weights are fp32.

    Returns:
        The last validation loss in nats, what the state takes in bytes per parameter, the median of the optimizer's
        steps in milliseconds, and of Adam's second moment the share of elements that the last update left where they
        were and the mean root.
    """
    training = corpus.training
    torch.manual_seed(seed)
    shape = ModelConfig(max_positions=training.length).of_size(training.size)
    model: torch.nn.Module = build_model(shape, padded_vocabulary(training.vocabulary))
    model.to(variant.weights)
    optimizer = make(parameter_groups(model, DECAY), rate)
    seconds, before = [], torch.zeros(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody keeps masters
        for number in range(training.updates):
            factor = warmup_polynomial(number, int(WARMUP * training.updates), training.updates)
            for group in optimizer.param_groups:
                group["lr"] = _rate(group["lr"], rate * factor)
            (batch,) = corpus.update(number, seed)
            (_loss(model, batch) / len(batch.labels)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            if number == training.updates - 1:
                before = _second_moments(optimizer)
            began = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
            optimizer.zero_grad()
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "loss": validation_loss(model, corpus.validation()),
        "parameters": parameters,
        "state_bytes_per_parameter": state_bytes(optimizer) / parameters,
        "step_milliseconds": 1e3 * statistics.median(seconds),
        **_movement(before, _second_moments(optimizer)),
    }


def _rate(old: float | torch.Tensor, new: float) -> float | torch.Tensor:
    """The new rate; a tensor, as torchao keeps it, gets it in place."""
    return old.fill_(new) if isinstance(old, torch.Tensor) else new


def _loss(model: torch.nn.Module, batch: MaskedBatch) -> torch.Tensor:
    """The summed cross-entropy, computed in bf16."""
    is_wide = next(model.parameters()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16) if is_wide else contextlib.nullcontext():
        loss: torch.Tensor = model(batch.input_ids, batch.positions, batch.labels)[0]
    return loss


def validation_loss(model: torch.nn.Module, batches: list[MaskedBatch]) -> float:
    """Mean cross-entropy on the masked tokens, nats."""
    model.eval()
    with torch.no_grad():
        total = sum(_loss(model, batch).item() for batch in batches)
    return total / sum(len(batch.labels) for batch in batches)


def _second_moments(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """All elements of the second moment as fp32; none where it is kept otherwise."""
    plain = [state.get(SECOND_MOMENT) for state in optimizer.state.values()]
    return torch.cat([v.float().reshape(-1) for v in plain if type(v) is torch.Tensor] or [torch.zeros(0)])


def _movement(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    has_any = after != 0
    if not has_any.any():
        return {}
    unmoved = (before == after)[has_any].double().mean().item()
    return {"second_moment_unmoved": unmoved, "second_moment_mean_root": after.sqrt().double().mean().item()}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the memory that the state's tensors hold, those inside of tensor subclasses too, each once."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif hasattr(value, "__tensor_flatten__"):
            waiting.extend(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())
