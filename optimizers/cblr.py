"""CBLR: layer-wise learning rates from the curvature of a layer's elements (after Gao and Zhong 2020); experimental."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.chunk_view import ChunkView
from .formulas.chunks import Summand, squares, values
from .formulas.hyperparameters import check_choice
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums, sums_over_layers
from .formulas.updates import TrustRule
from .layerwise import LayerwiseOptimizer
from .mclr import MCLR, usable_ratio
from .options.common import CommonOptions
from .sharding.local_tensors import summable

__all__ = ["CBLR"]

STATISTICS = ("median", "mean", "norm")


class CBLR(MCLR):
    r"""SGD with momentum whose step is scaled per layer by a statistic of |w| / |g|. Experimental.

    Were the loss a parabola with its minimum at zero in each weight, |g_j|/|w_j| would be its curvature and the inverse
    the step that reaches the minimum. What stands for a whole layer is a choice:

        q = median_j |w_j| / (|g_j| + λ|w_j| + ε)     statistic="median", which is `MCLR`
        q = mean_j   |w_j| / (|g_j| + λ|w_j| + ε)     statistic="mean"
        q = ‖w‖ / (‖g‖ + λ‖w‖ + ε)                    statistic="norm", which is `LARS` with a trust coefficient of 1
        v ← μv + lr · q · (g + λw)        w ← w - v

    Median and mean are taken over the elements whose gradient is not exactly zero, as the others say nothing about
    curvature. q is 1 where the statistic is zero and for layers that are not adapted. The mean is as large as its
    largest ratios, which elements with nearly no gradient have: up to |w|/ε each.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor. For adapted layers, the fraction of the step described above.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        eps: ε ≥ 0.
        statistic: See above. Also a group option.
        adapt: Which layers the ratio scales: all (True), none (False), or those of two or more dimensions (None). Also
            a group option.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``momentum_buffer`` (per element), ``step``. Sums per step, if sharded: as `MCLR` for the median, four
    all-reduces; ‖g‖², the sum of the ratios (fp64) and their count for the mean, one all-reduce; ‖w‖² and ‖g‖² for the
    norm, one all-reduce.

    Source: a reconstruction from the abstract of arXiv 2012.08795, which has curvature-based learning rates of layers
    (CBLR) with LARS as a special case and the median (MCLR) as another. The formulas are unverified: the paper was not
    at hand. ``statistic`` selects between the readings.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        statistic: str = "median",
        **common: Unpack[CommonOptions],
    ):
        LayerwiseOptimizer.__init__(
            self,
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "eps": eps,
                "statistic": statistic,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_choice("statistic", group["statistic"], STATISTICS)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        if group["statistic"] == "median":
            yield from super().stages(group, layers)
            return
        layers.step = layers.step + 1
        if group["statistic"] == "mean":
            yield self.sum_of_ratios
            layers.trust_ratio = usable_ratio(layers, layers.total("ratios") / layers.total("count"))
            return
        rule = TrustRule(
            layers.adapt, scales="factor", weight=group["weight_decay"], gradient=1.0, constant=group["eps"]
        )
        yield Sums("w", "g", of=self.update(group, layers), rules=[rule])
        layers.trust_ratio = rule(layers)

    @sums_over_layers("g", "ratios", "count")
    def sum_of_ratios(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        """Add up the ratios of the elements that have a gradient, in fp64: fp32 does not hold every ratio of fp32."""
        w, g = (summable(elements).to(torch.float64).abs() for elements in (x.w, x.g))
        ratios = w / x.plus(g, w, group["weight_decay"]).add_(group["eps"])
        known = g != 0
        return squares(x.g), values(torch.where(known, ratios, 0.0)), values(known.to(torch.float64))
