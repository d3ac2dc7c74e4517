"""LANS: LAMB with per-layer normalised gradients and a Nesterov-like second direction (Zheng et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_flag, check_update_clip
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import AdamUpdate, TrustRule
from .layerwise import LayerwiseAdam
from .options.common import CommonOptions

__all__ = ["LANS"]


class LANS(LayerwiseAdam):
    r"""LAMB of the normalised gradient, whose momentum and whose gradient are scaled by a ratio each.

    With g the layer's gradient divided by its norm:

        m ← β₁m + (1-β₁)g                v ← β₂v + (1-β₂)g²
        d = √(v/(1-β₂ᵗ)) + ε
        u_m = (m/(1-β₁ᵗ)) / d + λw       u_g = g / d + λw
        w ← w - lr · [ β₁ (‖w‖/‖u_m‖) u_m + (1-β₁) (‖w‖/‖u_g‖) u_g ]

    u_g has no bias correction of its own. Every layer's gradient is normalised, adapted or not, so no clipping is
    needed. A ratio is 1 where either of its norms is zero and for layers that are not adapted.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, outside the root.
        weight_decay: λ ≥ 0, inside both directions.
        normalize_grad: False uses the gradient as it is and saves one of the two all-reduces.
        update_clip: Divide the step of each layer by max(1, RMS / update_clip), after both ratios; as in `LAMB`, of the
            gradient as it is normalised. None: off. Not in the paper.
        adapt: Which layers the ratios scale: all (True, as the authors' code does), none (False), or those of two or
            more dimensions (None). Also a group option.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``exp_avg``, ``exp_avg_sq`` (per element), ``step``. Sums per step: ‖g‖², then ‖w‖², ‖u_m‖², ‖u_g‖²,
    two all-reduces if sharded. ``trust_ratios()`` reports the ratio of the momentum's direction, ‖w‖/‖u_m‖, divided by
    max(1, RMS / update_clip) where that is set.

    Source: the authors' fused kernel (szhengac/apex, csrc/multi_tensor_lans.cu), which this follows term by term; the
    paper is arXiv 2006.13484. That code's default is ``normalize_grad=True``, a later copy of it has False.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        normalize_grad: bool = True,
        update_clip: float | None = None,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "normalize_grad": normalize_grad,
                "update_clip": update_clip,
            },
            **common,
        )

    newer_options = ("update_clip",)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_flag("normalize_grad", group["normalize_grad"])
        check_update_clip(group["update_clip"])

    def accumulates(self, group: dict[str, Any]) -> str | None:
        return "gradient / norm" if group["normalize_grad"] else "gradient"

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        layers.g_norm = layers.gradient_ratio = torch.ones_like(layers.step)
        if group["normalize_grad"]:
            yield Sums("g")
            layers.g_norm = torch.where(layers.has_gradient(), layers.norm("g"), layers.g_norm)
        rule = TrustRule(layers.adapt, direction=1.0, update_clip=group["update_clip"])
        gradient_rule = replace(rule, scales="second_step", direction_name="u_g")
        yield Sums("w", "u", "u_g", "g", of=self.update(group, layers), rules=[rule, gradient_rule])
        layers.trust_ratio, layers.gradient_ratio = rule(layers), gradient_rule(layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        beta1, beta2 = group["betas"]
        return AdamUpdate(
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=group["lr"] * beta1 * layers.trust_ratio,
            second_step=group["lr"] * (1 - beta1) * layers.gradient_ratio,
            correction1=1 - beta1**layers.step,
            correction2=1 - beta2**layers.step,
            gain=1 - beta1,
            scale=1 / layers.g_norm,
            clips=group["update_clip"] is not None,
        )

    def modernize(self, group: dict[str, Any]) -> None:
        group.setdefault("update_clip", None)
