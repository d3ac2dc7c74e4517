"""Gradient noise from the norms of group gradients: what a larger batch would gain.

Every optimizer can keep the norms (`optimizer.collect_group_norms()` before the first backward; CLARS and the VR
optimizers do so anyway). They cost a norm of each local gradient and a few numbers per layer in a reduction that the
step has to do:

    noise = gradient_noise(optimizer, group_size=micro_batch_size)      # waits for the device once
    log(noise.model.scale, {name: layer.scale for name, layer in noise.layers.items()})

One step's estimates are noisy, and `signal` may even be negative; `RunningNoise` averages them over steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .formulas.hyperparameters import check_range
from .gradient_statistics.norms import GroupNorms, StatisticsError

__all__ = [
    "AdaScale",
    "GradientNoise",
    "NoiseScale",
    "RunningNoise",
    "adascale",
    "gradient_noise",
    "noise_scale",
    "sum_of_layers",
]

SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True)
class NoiseScale:
    """Unbiased estimates for one layer, or for the model.

    Attributes:
        signal: |G|^2, the squared norm of the true gradient.
        noise: tr(S), the variance of one sample's gradient, summed over the elements.
    """

    signal: float
    noise: float

    @property
    def scale(self) -> float:
        """The simple noise scale tr(S)/|G|^2, in samples. Far smaller batches waste steps, far larger ones data."""
        return self.noise / self.signal if self.signal else math.nan


@dataclass(frozen=True)
class AdaScale:
    """What AdaScale SGD makes of one step.

    Attributes:
        variance: Variance of the gradient at the unscaled batch size, at least 1e-6.
        signal: Squared norm of the true gradient, at least 0.
        gain: Factor in [1, scale] of the learning rate, and of the schedule's progress.
    """

    variance: float
    signal: float
    gain: float


@dataclass(frozen=True)
class GradientNoise:
    """Noise of one step: of the whole model, and of each layer by name."""

    model: NoiseScale
    layers: dict[str, NoiseScale]


def noise_scale(norms: GroupNorms, group_size: int = 1) -> NoiseScale:
    """Estimate signal and noise from gradients at two batch sizes, one group's b and all groups' B = kb.

        |G|^2 = (B ||gbar||^2 - b mean ||g_i||^2) / (B - b)
        tr(S) = (mean ||g_i||^2 - ||gbar||^2) / (1/b - 1/B)

    Args:
        norms: Of a layer, or of the model (`sum_of_layers`).
        group_size: b, samples per group; 1 measures the scale in groups.

    Raises:
        ValueError: If there are fewer than two groups.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1, as in gpt-neox.
    """
    check_range("group_size", group_size, 0.0, low_open=True)
    _need_two(norms)
    b, total = group_size, group_size * norms.groups
    return NoiseScale(
        signal=(total * norms.square_of_mean - b * norms.mean_square) / (total - b),
        noise=(norms.mean_square - norms.square_of_mean) / (1 / b - 1 / total),
    )


def adascale(norms: GroupNorms, scale: float | None = None) -> AdaScale:
    """Compute AdaScale's gain of one step.

        variance = S/(k-1) (mean ||g_i||^2 - ||gbar||^2)        signal = max(||gbar||^2 - variance/S, 0)
        gain = (variance + signal) / (variance/S + signal)

    Args:
        norms: Of the model, or of a layer.
        scale: S, how many times the batch is larger than the one that the learning rate was tuned for; k if None.

    Raises:
        ValueError: If there are fewer than two groups.

    Source: Johnson et al. 2020, arXiv 2007.05105, as in fairscale, which averages variance and signal over steps first
    (with beta = max(1 - k/1000, 0), see `RunningNoise`).
    """
    _need_two(norms)
    s = float(norms.groups) if scale is None else scale
    check_range("scale", s, 1.0)
    variance = s / (norms.groups - 1) * (norms.mean_square - norms.square_of_mean)
    signal = max(norms.square_of_mean - variance / s, 0.0)
    variance = max(variance, SMALLEST_VARIANCE)
    return AdaScale(variance, signal, (variance + signal) / (variance / s + signal))


def sum_of_layers(norms: Iterable[GroupNorms]) -> GroupNorms:
    """Return the model's norms. `mean_norm` is the norm of the layers' mean norms, a lower bound of the model's."""
    layers = list(norms)
    return GroupNorms(
        groups=max((layer.groups for layer in layers), default=0),
        mean_norm=math.hypot(*(layer.mean_norm for layer in layers)),
        mean_square=math.fsum(layer.mean_square for layer in layers),
        square_of_mean=math.fsum(layer.square_of_mean for layer in layers),
    )


def gradient_noise(optimizer: Any, group_size: int = 1) -> GradientNoise:
    """Measure the gradient noise of the optimizer's last step; waits for the device once.

    Gradients count as they were before clipping and without the loss scale. All ranks get the same numbers.

    Args:
        optimizer: One that keeps group norms.
        group_size: Samples per group, i.e. per rank and micro-batch.

    Raises:
        StatisticsError: If the optimizer does not keep norms, or has taken no step.
        ValueError: If there are fewer than two groups per step.
    """
    if optimizer.statistics is None:
        name = type(optimizer).__name__
        raise StatisticsError(f"{name} keeps no group norms: call collect_group_norms() before the first backward")
    norms = optimizer.statistics.norms()
    layers = {name: noise_scale(layer, group_size) for name, layer in norms.items()}
    return GradientNoise(noise_scale(sum_of_layers(norms.values()), group_size), layers)


class RunningNoise:
    """Running averages of signal and noise, each with bias correction; their quotient is the averaged noise scale.

    Args:
        beta: Weight of the past, in [0, 1).
    """

    def __init__(self, beta: float = 0.95):
        check_range("beta", beta, 0.0, 1.0, high_open=True)
        self.beta = beta
        self._signal = self._noise = self._weight = 0.0

    def update(self, noise: NoiseScale) -> NoiseScale:
        """Take one step's estimate and return the averages; one that is not finite is left out of them."""
        if math.isfinite(noise.signal) and math.isfinite(noise.noise):
            keep, new = self.beta, 1 - self.beta
            self._signal = keep * self._signal + new * noise.signal
            self._noise = keep * self._noise + new * noise.noise
            self._weight = keep * self._weight + new
        return self.average

    @property
    def average(self) -> NoiseScale:
        """The averages so far; NaN before the first estimate."""
        if not self._weight:
            return NoiseScale(math.nan, math.nan)
        return NoiseScale(self._signal / self._weight, self._noise / self._weight)

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` goes on from."""
        return {"signal": self._signal, "noise": self._noise, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self._signal, self._noise, self._weight = state["signal"], state["noise"], state["weight"]


def _need_two(norms: GroupNorms) -> None:
    if norms.groups < 2:
        raise ValueError(
            f"gradient noise needs at least 2 groups of samples per step (ranks x micro-batches), got {norms.groups}"
        )
