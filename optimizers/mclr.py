"""MCLR: layer-wise learning rates from the median curvature (after Gao and Zhong 2020); experimental."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.chunk_view import ChunkView
from .formulas.chunks import Summand, counts, squares
from .formulas.hyperparameters import check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, sums_over_layers
from .formulas.updates import MomentumUpdate
from .layerwise import LayerwiseMomentum
from .options.common import CommonOptions

__all__ = ["MCLR", "usable_ratio"]

DIGIT_BITS = 8
BINS = 1 << DIGIT_BITS
KEY_BITS = 32


class MCLR(LayerwiseMomentum):
    r"""SGD with momentum whose step is scaled per layer by the median of |w| / |g|. Experimental.

    Were the loss a parabola with its minimum at zero in each weight, |g_j|/|w_j| would be its curvature and the inverse
    the step that reaches the minimum. A layer's step is scaled by the median of those over its elements:

        q = median_j |w_j| / (|g_j| + λ|w_j| + ε)
        v ← μv + lr · q · (g + λw)        w ← w - v

    q is 1 where that median is zero (weights that start at zero) and for layers that are not adapted. Elements whose
    gradient is exactly zero say nothing about curvature and are left out of the median; with them, ε alone would set
    the step of an embedding most of whose rows are unused. The median of an even number of elements is the lower of
    the two in the middle, as in ``torch.median``.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor. For adapted layers, the fraction of the step described above.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        eps: ε ≥ 0.
        adapt: Which layers the ratio scales: all (True), none (False), or those of two or more dimensions (None). Also
            a group option.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``momentum_buffer`` (per element), ``step``. Sums per step: ‖g‖² and four histograms of 256 bins per
    layer, four all-reduces if sharded.

    The median is found exactly, however a layer is cut: the ratios are non-negative fp32 numbers (rounded to fp32 also
    for fp64 parameters), whose bit patterns sort as integers, and each all-reduce of histograms fixes the next eight
    bits of the median's pattern.

    Source: a reconstruction from the abstract of arXiv 2012.08795, which says that a layer's learning rate is fitted
    to its median curvature. The formula is not the paper's: the paper was not at hand.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "eps": eps,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_range("eps", group["eps"], 0.0)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        # The median's bit pattern is built from its leading digits; `rank` is its place among the keys that share them.
        layers.known_bits = torch.zeros_like(layers.step)
        layers.prefix = torch.zeros_like(layers.step)
        layers.rank = torch.zeros_like(layers.step)
        for digit in range(KEY_BITS // DIGIT_BITS):
            yield self.next_digit
            histogram = layers.total("histogram")
            if digit == 0:
                layers.rank = ((histogram.sum(dim=0) - 1) / 2).floor()
            up_to = histogram.cumsum(dim=0)
            below = up_to <= layers.rank
            layers.rank = layers.rank - torch.where(below, histogram, 0).sum(dim=0)
            layers.prefix = layers.prefix * BINS + below.sum(dim=0)
            layers.known_bits = layers.known_bits + DIGIT_BITS
        layers.trust_ratio = usable_ratio(layers, layers.prefix.to(torch.int32).view(torch.float32).double())

    @sums_over_layers("g", histogram=BINS)
    def next_digit(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        """Count, among the keys that begin with the digits found so far, how often each next digit occurs."""
        size = x.g.abs()
        denominator = x.plus(size, x.w.abs(), group["weight_decay"]).add_(group["eps"])
        keys = (x.w.abs() / denominator).float().view(torch.int32).to(torch.int64)
        remaining = KEY_BITS - x.of(layers.known_bits).to(torch.int64)
        candidate = (size != 0) & (keys >> remaining == x.of(layers.prefix).to(torch.int64))
        digits = (keys >> (remaining - DIGIT_BITS)) & (BINS - 1)
        return squares(x.g), counts(torch.where(candidate, digits, BINS), BINS)

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        factor = group["lr"] * layers.trust_ratio
        return MomentumUpdate(group["momentum"], group["weight_decay"], factor, step=torch.ones_like(factor))


def usable_ratio(layers: LayerTable, statistic: torch.Tensor) -> torch.Tensor:
    """A statistic of the elements' ratios; 1 where it is zero and for layers that are not adapted. Shape (layers,)."""
    usable = layers.adapt & (statistic != 0) & layers.has_gradient()
    # A sum of squares shows a NaN or an infinity that ratios, or their order, may hide.
    statistic = torch.where(layers.total("g").isfinite(), statistic, torch.nan)
    return torch.where(usable, statistic, torch.ones_like(statistic))
