"""What is measured at every update, without making the host wait for the device at every update.

Losses, trust ratios and gradient norms stay where they were computed until `fetch`, which brings those of all updates
since the last one over in one copy (and adds the losses up over the ranks in one all-reduce).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
import torch

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.gradient_statistics.norms import norms_from_table
from trustratio.optimizers.noise_scale import RunningNoise, noise_scale, sum_of_layers

from ..common.errors import RecipeError
from ..configuration.config import RecipeConfig
from ..model.flops import ModelFlops
from ..model.optimizer import is_baseline
from ..rules.global_batch import BatchPlan
from .engines import TrainingEngine


def measures_noise(config: RecipeConfig, plans: Sequence[BatchPlan]) -> bool:
    """Tell whether the run measures the gradient noise scale: as configured, or wherever it can in all phases."""
    if config.run.noise_scale is not None:
        return config.run.noise_scale
    several = all(plan.ranks * plan.accumulation >= 2 for plan in plans)
    # Norms are taken of whole parameters' gradients, which segments cut into several layers.
    return several and not is_baseline(config.optimizer.name) and "segments" not in config.optimizer.options


def check_noise_scale(config: RecipeConfig, plan: BatchPlan) -> None:
    """Check that the gradient noise scale can be measured if it is asked for.

    Raises:
        RecipeError: the optimizer keeps no gradient norms, or an update has a single micro-batch.
    """
    if not config.run.noise_scale:
        return
    if is_baseline(config.optimizer.name):
        raise RecipeError(
            f"run.noise_scale=true needs one of trustratio's optimizers, which keep the norms of single micro-batches' "
            f"gradients; {config.optimizer.name!r} does not"
        )
    if plan.ranks * plan.accumulation < 2:
        raise RecipeError(
            "run.noise_scale=true compares the gradients of at least 2 micro-batches per update; "
            f"{plan.describe(config.data.sequence_length)} has 1: halve --micro_batch"
        )


@dataclass
class _Held:
    """One update's record, and what of it is still on the device."""

    record: dict[str, Any]
    loss: torch.Tensor
    ratios: tuple[list[str], torch.Tensor]
    norms: tuple[list[str], torch.Tensor] | None
    plan: BatchPlan
    length: int


@dataclass
class StepMetrics:
    """Collects measurements update by update; every rank runs it in step.

    Attributes:
        engine: whose optimizer and device are observed.
        flops: of the model.
        peak: FLOP/s that one device can do at most; None if unknown, then no utilisation is given.
        measure_noise: whether the gradient noise scale is measured; set before the first backward pass.
    """

    engine: TrainingEngine
    flops: ModelFlops
    peak: float | None = None
    measure_noise: bool = False
    _held: list[_Held] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)
    _noise: dict[str, RunningNoise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Have the optimizer keep norms of single micro-batches' gradients, if the noise is measured."""
        if self.measure_noise:
            self.engine.optimizer.collect_group_norms()  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Leave the time of the block (validation, checkpoints) out of the throughput."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def begin(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def add(
        self,
        step: int,
        sequences: int,
        plan: BatchPlan,
        length: int,
        lr: float,
        loss: torch.Tensor,
        masked: int,
        data_wait: float,
    ) -> None:
        """Take note of an update; nothing waits for the device.

        Args:
            step: number of the update, from 1.
            sequences: read since the beginning of the run.
            plan: batch division of the update.
            length: tokens per sequence.
            lr: learning rate of the update.
            loss: this rank's part of the loss, a scalar on the device.
            masked: tokens predicted over all ranks.
            data_wait: seconds in which this rank waited for its micro-batches.
        """
        record = {
            "kind": "train",
            "step": step,
            "sequences": sequences,
            "lr": lr,
            "masked_tokens": masked,
            "data_wait_seconds": data_wait,
        }
        optimizer = self.engine.optimizer
        ratios = optimizer.trust_ratio_vector() if hasattr(optimizer, "trust_ratio_vector") else ([], torch.zeros(0))
        norms = optimizer.statistics.norm_table() if self.measure_noise else None  # type: ignore[attr-defined]
        self._held.append(_Held(record, loss, ratios, norms, plan, length))

    def fetch(self) -> list[dict[str, Any]]:
        """Return the records of all updates added since the last call (collective); waits for the device once.

        Times and rates are means over these updates.
        """
        if not self._held:
            return []
        held, self._held = self._held, []
        losses = self.engine.sum_over_ranks(torch.stack([h.loss for h in held]))
        values = _to_host([losses, *(t for h in held for t in _tensors(h))], self.engine.device)
        seconds = max(time.perf_counter() - self._since, 1e-9) / len(held)
        self._since = time.perf_counter()
        optimizer, memory = self.engine.optimizer, self._memory()
        adapted = optimizer.adapted_layers() if isinstance(optimizer, LayerwiseOptimizer) else set()
        for h, loss in zip(held, next(values), strict=True):
            h.record["loss"] = loss
            self._add_rates(h, seconds)
            _add_ratios(h.record, dict(zip(h.ratios[0], next(values), strict=True)), adapted)
            if h.norms is not None:
                self._add_noise(h, next(values))
            h.record |= memory
        held[-1].record["gradient_norm"] = self.engine.gradient_norm()
        return [h.record for h in held]

    def _memory(self) -> dict[str, int]:
        memory = {"host_memory_bytes": psutil.Process().memory_info().rss}
        if self.engine.device.type == "cuda":
            memory["device_peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.engine.device)
        return memory

    def _add_rates(self, held: _Held, seconds: float) -> None:
        tokens = held.plan.sequences * held.length
        flops = self.flops.update(tokens, held.record["masked_tokens"], held.length)
        held.record["seconds"] = seconds
        held.record["sequences_per_second"] = held.plan.sequences / seconds
        held.record["tokens_per_second"] = tokens / seconds
        held.record["model_flops_per_second"] = flops / seconds
        if self.peak is not None:
            held.record["utilisation"] = flops / seconds / (self.peak * self.engine.ranks)

    def _add_noise(self, held: _Held, rows: list[float]) -> None:
        assert held.norms is not None
        names, table = held.norms
        count = len(names)
        norms = norms_from_table(names, [rows[i * count : (i + 1) * count] for i in range(len(table))])
        layers = {name: noise_scale(of_layer, held.plan.micro) for name, of_layer in norms.items()}
        model = noise_scale(sum_of_layers(norms.values()), held.plan.micro)
        # Signal and noise are averaged before they are divided: one update's quotient says next to nothing.
        average = {name: self._noise.setdefault(name, RunningNoise()).update(n) for name, n in layers.items()}
        held.record["gradient_signal"], held.record["gradient_noise"] = model.signal, model.noise
        held.record["noise_scale"] = self._noise.setdefault("", RunningNoise()).update(model).scale
        held.record["noise_scales"] = {name: mean.scale for name, mean in average.items()}


def _add_ratios(record: dict[str, Any], ratios: dict[str, float], adapted: set[str]) -> None:
    """Add the ratios, and the range of those of the adapted layers."""
    record["trust_ratios"] = ratios
    scaling = [ratio for name, ratio in ratios.items() if name in adapted]
    if scaling:
        record["trust_ratio_min"], record["trust_ratio_max"] = min(scaling), max(scaling)
        record["trust_ratio_median"] = median(scaling)


def _tensors(held: _Held) -> list[torch.Tensor]:
    return [held.ratios[1], *([] if held.norms is None else [held.norms[1]])]


def _to_host(tensors: list[torch.Tensor], device: torch.device) -> Iterator[list[float]]:
    """Yield the tensors' values as flat lists, all brought over in one copy."""
    flat = [tensor.detach().to(device, torch.float64, non_blocking=True).reshape(-1) for tensor in tensors]
    values = torch.cat(flat).tolist()
    begin = 0
    for tensor in tensors:
        yield values[begin : begin + tensor.numel()]
        begin += tensor.numel()
