"""Trust ratios and gradient noise under the names by which trainers log them."""

from __future__ import annotations

import torch

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.noise_scale import RunningNoise, adascale, gradient_noise, sum_of_layers

__all__ = ["RatioScalars"]


class RatioScalars:
    """What one of our optimizers did in its last step, as numbers by name.

    `trust_ratio/min`, `/median` and `/max` over the layers that the ratio scales, `trust_ratio/LAYER` if asked for;
    with noise also `gradient_noise/scale` (tr(S)/|G|^2 in samples, averaged over the calls), `/signal` (|G|^2),
    `/noise` (tr(S)) and `/adascale_gain`, each of the step. Waits for the device; steps in between do not.

    Args:
        per_layer: Each layer's ratio too.
        noise: What follows from the norms of the micro-batches' gradients, which the optimizer then has to collect; a
            step of a single micro-batch has none.
    """

    def __init__(self, per_layer: bool = False, noise: bool = False):
        self.per_layer = per_layer
        self.noise = noise
        self._running = RunningNoise()

    def of(self, optimizer: LayerwiseOptimizer, group_size: int = 1) -> dict[str, float]:
        """Return the numbers of the last step; `group_size` is the samples of one rank's micro-batch."""
        return {**self._ratios(optimizer), **(self._gradient_noise(optimizer, group_size) if self.noise else {})}

    def _ratios(self, optimizer: LayerwiseOptimizer) -> dict[str, float]:
        ratios = optimizer.trust_ratios()
        scaling = optimizer.adapted_layers()
        of_layers = [ratio for name, ratio in ratios.items() if name in scaling]
        adapted = torch.tensor(of_layers, dtype=torch.float64, device="cpu")  # of which NaN is the least and the most
        found = {}
        if len(adapted):
            summary = {"min": adapted.min(), "median": adapted.median(), "max": adapted.max()}
            found = {f"trust_ratio/{name}": value.item() for name, value in summary.items()}
        if self.per_layer:
            found |= {f"trust_ratio/{name}": ratio for name, ratio in ratios.items()}
        return found

    def _gradient_noise(self, optimizer: LayerwiseOptimizer, group_size: int) -> dict[str, float]:
        assert optimizer.statistics is not None
        norms = optimizer.statistics.norms()
        if min((of_layer.groups for of_layer in norms.values()), default=0) < 2:
            return {}
        noise = gradient_noise(optimizer, group_size=group_size)
        return {
            "gradient_noise/scale": self._running.update(noise.model).scale,
            "gradient_noise/signal": noise.model.signal,
            "gradient_noise/noise": noise.model.noise,
            "gradient_noise/adascale_gain": adascale(sum_of_layers(norms.values())).gain,
        }
