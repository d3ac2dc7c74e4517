"""Whether Adam's second moment moves: with β₂ = 0.999 most updates are below half the distance of two bf16 numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.sixteen_bits.variants import VARIANTS, rounding_to_nearest
from trustratio.optimizers import LAMB

__all__ = ["SECOND_BETAS", "measure_standstill"]

SECOND_BETAS = (0.9, 0.99, 0.999)
KEPT = {
    "fp32": "fp32 weights, fp32 state",
    "bf16, stochastic": "fp32 weights, bf16 state",
    "bf16, to nearest": "fp32 weights, bf16 state to nearest",
}
FALL = 0.1
"""By how much gradients are multiplied after the first half of the steps."""


def measure_standstill(
    elements: int = 1 << 12, steps: int = 4000, betas: Sequence[float] = SECOND_BETAS
) -> dict[str, Any]:
    """Let the gradients of one layer be normal, of variance 1, and fall to a tenth after half of the steps.

    Returns:
        For each β₂ and way to keep the state: which share of the second moments a step left where they were, in the
        mean over the last hundred steps of each half; and the mean of v/(1 - β₂ᵗ) there, over the gradients' variance.
    """
    return {
        "elements": elements,
        "steps": steps,
        "fall": FALL,
        "rows": {
            str(beta2): {name: _run(variant, beta2, elements, steps) for name, variant in KEPT.items()}
            for beta2 in betas
        },
    }


def _run(name: str, beta2: float, elements: int, steps: int) -> dict[str, list[float]]:
    variant = VARIANTS[name]
    weights = torch.nn.Parameter(torch.ones(elements))
    optimizer = LAMB([weights], lr=0.0, betas=(0.9, beta2), **variant.options())
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"unmoved": [], "second_moment": []}
    with rounding_to_nearest() if variant.is_nearest else contextlib.nullcontext():
        for half, size in enumerate((1.0, FALL)):
            unmoved, means = 0.0, 0.0
            last = min(100, steps // 2 - 1)
            for number in range(steps // 2):
                weights.grad = size * torch.randn(elements, generator=generator)
                is_counted = number >= steps // 2 - last
                before = optimizer.state[weights]["exp_avg_sq"].clone() if is_counted else None
                optimizer.step()
                if before is not None:
                    v = optimizer.state[weights]["exp_avg_sq"]
                    unmoved += (v == before).double().mean().item() / last
                    means += v.double().mean().item() / last
            correction = 1 - beta2 ** ((half + 1) * steps // 2)
            found["unmoved"].append(unmoved)
            found["second_moment"].append(means / correction / size**2)
    return found
