"""CLARS: complete layer-wise adaptive rate scaling (Huo, Gu, Huang 2020, arXiv 2002.01576)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_choice, check_range
from .formulas.layer_table import LayerTable, safe_ratio
from .formulas.stages import Stage, Sums
from .formulas.updates import MomentumUpdate
from .layerwise import LayerwiseMomentum
from .options.common import CommonOptions

__all__ = ["CLARS"]

STATISTICS = ("norm", "square")


class CLARS(LayerwiseMomentum):
    r"""LARS whose denominator is the norm of single gradients, not of their mean.

    With g_i the gradients of k groups of samples (a group is one rank's one micro-batch), g their mean and λ the decay:

        n = (1/k) Σᵢ‖gᵢ‖             statistic="norm"
        n = (1/k) Σᵢ‖gᵢ‖² / ‖g‖      statistic="square"
        q = γ‖w‖ / (n + λ‖w‖)        v ← μv + lr · q · (g + λw)        w ← w - v

    Where single gradients disagree, n exceeds ‖g‖ and the layer steps less far than under LARS; where all agree, the
    two are the same. The ratio is 1 where ‖w‖ or ‖g‖ is zero and for layers that are not adapted.

    Group gradients stand for the paper's per-sample gradients: for a group of b samples n lies between ‖g‖ and the
    per-sample value, the lower the larger b is. They are seen in ``backward()``, so construct the optimizer with the
    model's own parameters (see `GradientStatistics`).

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate lr ≥ 0; a float or a tensor.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        trust_coefficient: γ > 0.
        statistic: See above.
        adapt: Which layers the ratio scales: all (True), none (False), or those of two or more dimensions (None).
            Also a group option.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.
        StatisticsError: At a step whose group gradients were never seen.
        LayoutError: At a step where there are several ranks and nobody is known to average gradients; see
            `data_parallel_group`.

    State: ``momentum_buffer`` (per element), ``step``. Sums per step: ‖w‖², ‖g‖² and the groups' norms, in one
    all-reduce if sharded or under DDP. No more is sent, since each rank has its groups' whole layers in backward.

    Source: only the paper's abstract was at hand, and no code by its authors is known. ``statistic="norm"`` is the
    algorithm as remembered, with weight decay placed as in LARS; ``statistic="square"`` is what the paper's bound, a
    step of 1 over smoothness times gradient variance, gives literally. Two revisions of KhoiDOO/tvlars had
    code of others, one with a norm and one with a square of one mean gradient. Neither form is verified, nor γ.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    group_statistics = "norms"

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.01,
        statistic: str = "norm",
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "statistic": statistic,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_range("trust_coefficient", group["trust_coefficient"], 0.0, low_open=True)
        check_choice("statistic", group["statistic"], STATISTICS)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        yield Sums("w", "g")
        w_norm, g_norm = layers.norm("w"), layers.norm("g")
        single = layers.total("group_norm") if group["statistic"] == "norm" else layers.total("group_square") / g_norm
        denominator = single + group["weight_decay"] * w_norm
        bounded = layers.adapt & (g_norm != 0)
        layers.trust_ratio = safe_ratio(group["trust_coefficient"] * w_norm, denominator, bounded)

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        factor = group["lr"] * layers.trust_ratio
        return MomentumUpdate(group["momentum"], group["weight_decay"], factor, step=torch.ones_like(factor))
