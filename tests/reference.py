"""Float64, single-process, one-layer-at-a-time references, written plainly from the papers' equations.

Each takes a layer's weights `w`, its gradient `g`, the layer's own `state` dict (empty at first) and options, and
returns (new w, trust ratio). They share nothing with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .references.adam import (
    cowclip,
    curvature_adamw,
    lamb,
    lambc,
    lans,
    stableadamw,
    vradam,
    vrlamb,
)
from .references.belief import adabelief, adashift, fastadabelief
from .references.common import Tensor
from .references.momentum import (
    cblr,
    clars,
    curvature_sgd,
    lars,
    mclr,
    novograd,
    sngm,
    tvlars,
    vrlars,
    vrsgd,
)

REFERENCES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "lars": lars,
    "lamb": lamb,
    "lambc": lambc,
    "lans": lans,
    "novograd": novograd,
    "sngm": sngm,
    "tvlars": tvlars,
    "mclr": mclr,
    "cblr": cblr,
    "cowclip": cowclip,
    "curvature_sgd": curvature_sgd,
    "curvature_adamw": curvature_adamw,
    "clars": clars,
    "vrsgd": vrsgd,
    "vrlars": vrlars,
    "vradam": vradam,
    "vrlamb": vrlamb,
    "adabelief": adabelief,
    "fastadabelief": fastadabelief,
    "adashift": adashift,
    "stableadamw": stableadamw,
}


def run_reference(
    name: str,
    weights: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    options: dict[str, dict[str, Any]],
    max_norm: float | None = None,
    resolution: float = 2.0**-23,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train every layer for len(gradients) steps.

    Args:
        name: Key of `REFERENCES`.
        weights: Initial weights by layer name.
        gradients: Per step and layer, the gradients of all groups of samples, shape (groups, *layer); the step takes
            their mean. A layer that is missing or all zero is left untouched.
        options: The optimizer's options by layer name.
        max_norm: Clip the whole model's gradient norm to this first, as DeepSpeed does, 1e-6 included.
        resolution: Epsilon of the dtype in which gradients are added up.

    Returns:
        The final weights by name (fp64) and, per step, the ratios of the layers that were updated.
    """
    weights = {layer: w.double() for layer, w in weights.items()}
    states: dict[str, dict[str, Any]] = {layer: {} for layer in weights}
    ratios: list[dict[str, float]] = []
    for step in gradients:
        groups = {layer: g.double() for layer, g in step.items()}
        g64 = {layer: mean for layer, g in groups.items() if (mean := g.mean(dim=0)).any()}
        norm = math.sqrt(sum(g.square().sum().item() for g in g64.values()))
        if max_norm is not None:
            divisor = max(1.0, (norm + 1e-6) / max_norm)
            groups = {layer: g / divisor for layer, g in groups.items()}
            g64 = {layer: g / divisor for layer, g in g64.items()}
            norm = norm / divisor
        ratios.append({})
        for layer, g in g64.items():
            states[layer].update(model_gradient_norm=norm, group_gradients=groups[layer], resolution=resolution)
            weights[layer], ratios[-1][layer] = REFERENCES[name](weights[layer], g, states[layer], **options[layer])
    return weights, ratios


def relative_error(w: Tensor, expected: Tensor, initial: Tensor, path: float | None = None) -> float:
    """‖w - expected‖ / ‖expected - initial‖: the error of the weight *change*.

    Args:
        w: What was found.
        expected: The reference.
        initial: Weights before training.
        path: Length to divide by instead, e.g. of the way that the weights went.
    """
    change = (expected.double() - initial.double()).norm().item() if path is None else path
    error = (w.double() - expected.double()).norm().item()
    return error if change == 0 else error / change
