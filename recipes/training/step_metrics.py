"""What is measured at every update, without making the host wait for the device at every update.

Losses, trust ratios and gradient norms stay where they were computed until `fetch`, which brings those of all updates
since the last one over in one copy (and adds the losses up over the ranks in one all-reduce).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.gradient_statistics.norms import norms_from_table
from trustratio.optimizers.noise_scale import RunningNoise, noise_scale, sum_of_layers

from ..common.files import write_json
from ..configuration.config import RecipeConfig
from ..configuration.phases import Phase
from ..model.flops import ModelFlops, peak_of
from ..model.optimizer import is_baseline, sample_interval
from ..rules.global_batch import BatchPlan
from .engines import Observed

RUNNING_MEANS = "running_means.json"
"""The file of a checkpoint from which the means of the gradient noise scale go on."""


def measures_noise(config: RecipeConfig, plans: Sequence[BatchPlan]) -> bool:
    """Tell whether the run measures the gradient noise scale: as configured, or wherever it can in all phases."""
    if config.run.batch_from_noise:
        return True
    if config.run.noise_scale is not None:
        return config.run.noise_scale
    if sample_interval(config.optimizer) is not None:  # its second passes would be counted
        return False
    several = all(plan.ranks * plan.accumulation >= 2 for plan in plans)
    # Norms are taken of whole parameters' gradients, which segments cut into several layers.
    return several and not is_baseline(config.optimizer.name) and "segments" not in config.optimizer.options


@dataclass(frozen=True)
class Update:
    """An update that was done, as the loop that did it knows it.

    Attributes:
        step: its number in the run, from 1.
        phase: that it belongs to.
        plan: its batch division.
        learning_rate: that it was done with.
        loss: this rank's part of the loss, a scalar on the device.
        masked_tokens: in the loss, over all ranks.
        data_wait: seconds in which this rank waited for its micro-batches.
        sequences: read since the beginning of the run.
        predicted_tokens: predicted over all ranks, if those with the smallest losses were then discarded.
        passes: over the micro-batches, forward and backward; 2 with a sample of the curvature.
    """

    step: int
    phase: Phase
    plan: BatchPlan
    learning_rate: float
    loss: torch.Tensor
    masked_tokens: int
    data_wait: float
    sequences: int
    predicted_tokens: int | None = None
    passes: int = 1

    def record(self) -> dict[str, Any]:
        """Return what needs no reading from the device."""
        record = {
            "kind": "train",
            "step": self.step,
            "sequences": self.sequences,
            "batch": self.plan.sequences,
            "lr": self.learning_rate,
            "masked_tokens": self.masked_tokens,
            "data_wait_seconds": self.data_wait,
        }
        if self.predicted_tokens is not None:
            record["kept_fraction"] = self.masked_tokens / max(self.predicted_tokens, 1)
        return record


@dataclass
class _Held:
    """An update and what the optimizer says of it: names of layers, and a tensor that is still on the device."""

    update: Update
    ratios: tuple[list[str], torch.Tensor]
    norms: tuple[list[str], torch.Tensor] | None

    def tensors(self) -> list[torch.Tensor]:
        return [self.ratios[1], *([] if self.norms is None else [self.norms[1]])]


@dataclass
class StepMetrics:
    """Collects measurements update by update; every rank runs it in step.

    Attributes:
        engine: whose optimizer and device are observed.
        flops: of the model.
        peak: FLOP/s that one device can do at most; None if unknown, then no utilisation is given.
        measure_noise: whether the gradient noise scale is measured; set before the first backward pass.
    """

    engine: Observed
    flops: ModelFlops
    peak: float | None = None
    measure_noise: bool = False
    _held: list[_Held] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)
    _noise: dict[str, RunningNoise] = field(default_factory=dict)

    @classmethod
    def of_run(cls, engine: Observed, config: RecipeConfig, plans: Sequence[BatchPlan], rows: int) -> StepMetrics:
        """Measure what a run's configuration asks for.

        Args:
            engine: before its first backward pass.
            config: resolved and checked.
            plans: batch division of each phase.
            rows: of the model's embedding table.
        """
        return cls(
            engine,
            ModelFlops.of(config.model, rows),
            peak_of(engine.device, config.training.precision, config.run.peak_tflops),
            measures_noise(config, plans),
        )

    def __post_init__(self) -> None:
        """Have the optimizer keep norms of single micro-batches' gradients, if the noise is measured."""
        if self.measure_noise:
            assert self._layerwise is not None
            self._layerwise.collect_group_norms()

    def save(self, checkpoint: Path) -> None:
        """Write the running means into a checkpoint, on the first rank; they are the same on all."""
        if self._noise and self.engine.rank == 0:
            write_json(checkpoint / RUNNING_MEANS, {name: mean.state_dict() for name, mean in self._noise.items()})

    def load(self, checkpoint: Path) -> None:
        """Go on with a checkpoint's running means, if it has any; earlier releases wrote none."""
        if self.measure_noise and (checkpoint / RUNNING_MEANS).is_file():
            for name, state in json.loads((checkpoint / RUNNING_MEANS).read_text()).items():
                self._noise.setdefault(name, RunningNoise()).load_state_dict(state)

    @property
    def _layerwise(self) -> LayerwiseOptimizer | None:
        """The optimizer, if it has trust ratios to tell; None of a baseline."""
        return self.engine.optimizer if isinstance(self.engine.optimizer, LayerwiseOptimizer) else None

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Leave the time of the block (validation, checkpoints) out of the throughput."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def begin(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def add(self, update: Update) -> None:
        """Take note of the update that the engine has just done; nothing waits for the device."""
        optimizer, norms = self._layerwise, None
        ratios = ([], torch.zeros(0, device="cpu")) if optimizer is None else optimizer.trust_ratio_vector()
        if self.measure_noise and optimizer is not None and optimizer.statistics is not None and self.engine.applied():
            norms = optimizer.statistics.norm_table()
        self._held.append(_Held(update, ratios, norms))

    def fetch(self) -> list[dict[str, Any]]:
        """Return the records of all updates added since the last call (collective); waits for the device once.

        Times and rates are means over these updates.
        """
        if not self._held:
            return []
        held, self._held = self._held, []
        losses = self.engine.sum_over_ranks(torch.stack([each.update.loss for each in held]))
        values = _to_host([losses, *(tensor for each in held for tensor in each.tensors())], self.engine.device)
        # The copy has waited for the device, so the time until here is that of all these updates.
        seconds = max(time.perf_counter() - self._since, 1e-9) / len(held)
        self._since = time.perf_counter()
        memory = self._memory()
        adapted = set() if self._layerwise is None else self._layerwise.adapted_layers()
        records = []
        for each, loss in zip(held, next(values), strict=True):
            record = each.update.record() | {"loss": loss} | self._rates(each.update, seconds)
            record |= _ratios(dict(zip(each.ratios[0], next(values), strict=True)), adapted)
            if each.norms is not None:
                record |= self._noise_scales(each.norms, next(values), each.update.plan.micro)
            records.append(record | memory)
        records[-1]["gradient_norm"] = self.engine.gradient_norm()
        return records

    def _memory(self) -> dict[str, int]:
        memory = {"host_memory_bytes": psutil.Process().memory_info().rss}
        if self.engine.device.type == "cuda":
            memory["device_peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.engine.device)
        return memory

    def _rates(self, update: Update, seconds: float) -> dict[str, float]:
        sequences, length = update.plan.sequences, update.phase.sequence_length
        flops = update.passes * self.flops.update(sequences * length, update.masked_tokens, length)
        if update.predicted_tokens is not None:  # their losses took a forward pass of its own
            flops += self.flops.forward(sequences * length, update.predicted_tokens, length)
        rates = {
            "seconds": seconds,
            "sequences_per_second": sequences / seconds,
            "tokens_per_second": sequences * length / seconds,
            "model_flops_per_second": flops / seconds,
        }
        if self.peak is not None:
            rates["utilisation"] = flops / seconds / (self.peak * self.engine.ranks)
        return rates

    def _noise_scales(self, norms: tuple[list[str], torch.Tensor], values: list[float], micro: int) -> dict[str, Any]:
        names, table = norms
        count = len(names)
        by_layer = norms_from_table(names, [values[i * count : (i + 1) * count] for i in range(len(table))])
        of_model = sum_of_layers(by_layer.values())
        if of_model.groups < 2:  # the rest of a phase that a growing batch left
            return {}
        layers = {name: noise_scale(of_layer, micro) for name, of_layer in by_layer.items()}
        model = noise_scale(of_model, micro)
        # Signal and noise are averaged before they are divided: one update's quotient says next to nothing.
        average = {name: self._noise.setdefault(name, RunningNoise()).update(n) for name, n in layers.items()}
        return {
            "gradient_signal": model.signal,
            "gradient_noise": model.noise,
            "noise_scale": self._noise.setdefault("", RunningNoise()).update(model).scale,
            "noise_scales": {name: mean.scale for name, mean in average.items()},
        }


def _ratios(ratios: dict[str, float], adapted: set[str]) -> dict[str, Any]:
    """Return the ratios, and the range of those of the adapted layers."""
    scaling = [ratio for name, ratio in ratios.items() if name in adapted]
    if not scaling:
        return {"trust_ratios": ratios}
    return {
        "trust_ratios": ratios,
        "trust_ratio_min": min(scaling),
        "trust_ratio_max": max(scaling),
        "trust_ratio_median": median(scaling),
    }


def _to_host(tensors: list[torch.Tensor], device: torch.device) -> Iterator[list[float]]:
    """Yield the tensors' values as flat lists, all brought over in one copy."""
    flat = [tensor.detach().to(device, torch.float64, non_blocking=True).reshape(-1) for tensor in tensors]
    values = torch.cat(flat).tolist()
    begin = 0
    for tensor in tensors:
        yield values[begin : begin + tensor.numel()]
        begin += tensor.numel()
