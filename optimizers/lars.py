"""LARS: layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .chunks import ChunkView, Summand, squares
from .hyperparameters import check_choice, check_flag, check_range
from .layers import LayerTable, safe_ratio
from .layerwise import LayerwiseOptimizer, Stage, sums_over_layers

__all__ = ["LARS"]

MOMENTUM_FORMS = ("scaled", "gradient", "unscaled")


class LARS(LayerwiseOptimizer):
    r"""SGD with momentum whose step is scaled per layer by η‖w‖ / (‖g‖ + λ‖w‖ + ε).

    With d = g + λw and q the layer's ratio (1 for layers that are not adapted, and where ‖w‖ or ‖g‖ is zero):

    - ``momentum_form="scaled"``: v ← μv + lr·q·d, w ← w - v. The paper and MLPerf.
    - ``momentum_form="gradient"``: v ← μv + q·d, w ← w - lr·v. timm, and LARC without its clip.
    - ``momentum_form="unscaled"``: v ← μv + d, w ← w - lr·q·v.

    The three agree while lr and q stay constant. Nesterov replaces v in the weight update by μv plus what was last
    added to it. The denominator is the sum of norms, not the norm of the sum, as in MLPerf, timm and apex's LARC.
    Layers with ratio 1 still decay; put biases and norm weights into a group with ``weight_decay=0``, as MLPerf does.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate lr ≥ 0; a float or a tensor.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        trust_coefficient: η > 0.
        eps: ε ≥ 0.
        nesterov: Use Nesterov momentum; needs ``momentum > 0``.
        momentum_form: See above.
        adapt: Which layers the ratio scales: all (True), none (False), or those of two or more dimensions (None).
            Also a group option.

    Raises:
        ValueError: If an argument is out of range.

    State: ``momentum_buffer`` (per element, fp32), ``step``. Sums per step: ‖w‖², ‖g‖², one all-reduce if sharded.

    Source: Algorithm 1 of the paper; the momentum forms from the reference code named above.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        nesterov: bool = False,
        momentum_form: str = "scaled",
        *,
        adapt: bool | None = None,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "eps": eps,
                "nesterov": nesterov,
                "momentum_form": momentum_form,
                "adapt": adapt,
            },
        )

    @property
    def element_state(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if any(group["momentum"] for group in self.param_groups) else ()

    def check(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_range("momentum", group["momentum"], 0.0, 1.0, high_open=True)
        check_range("weight_decay", group["weight_decay"], 0.0)
        check_range("trust_coefficient", group["trust_coefficient"], 0.0, low_open=True)
        check_range("eps", group["eps"], 0.0)
        check_flag("nesterov", group["nesterov"])
        check_choice("momentum_form", group["momentum_form"], MOMENTUM_FORMS)
        if group["nesterov"] and not group["momentum"]:
            raise ValueError(f"nesterov=True needs momentum in (0, 1), got {group['momentum']!r}")

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        yield self.norms
        w_norm, g_norm = layers.norm("w"), layers.norm("g")
        bounded = layers.adapt & (g_norm != 0)
        denominator = g_norm + group["weight_decay"] * w_norm + group["eps"]
        layers.trust_ratio = safe_ratio(group["trust_coefficient"] * w_norm, denominator, bounded)

    @sums_over_layers("w", "g")
    def norms(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return squares(x.w), squares(x.g)

    def change(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        """W's decrease, with the momentum buffer updated in place."""
        lr, ratio = group["lr"], x.of(layers.trust_ratio)
        d = x.g.add(x.w, alpha=group["weight_decay"])
        if group["momentum_form"] == "scaled":
            return self.with_momentum(group, x, lr * ratio * d)
        if group["momentum_form"] == "gradient":
            return lr * self.with_momentum(group, x, ratio * d)
        return lr * ratio * self.with_momentum(group, x, d)

    def with_momentum(self, group: dict[str, Any], x: ChunkView, increment: torch.Tensor) -> torch.Tensor:
        """V ← μv + increment; returns v, or μv + increment again for Nesterov."""
        if not group["momentum"]:
            return increment
        v = x.momentum_buffer.mul_(group["momentum"]).add_(increment)
        return increment.add(v, alpha=group["momentum"]) if group["nesterov"] else v
