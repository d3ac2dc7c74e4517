"""LARS: layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_choice, check_flag, check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import MomentumUpdate, TrustRule
from .layerwise import LayerwiseMomentum
from .options.common import CommonOptions

__all__ = ["ACCUMULATES", "LARS"]

ACCUMULATES = {
    "scaled": "lr * ratio * (gradient + decay)",
    "gradient": "ratio * (gradient + decay)",
    "unscaled": "gradient + decay",
}
"""What the momentum buffer adds up, by `momentum_form`."""
MOMENTUM_FORMS = tuple(ACCUMULATES)


class LARS(LayerwiseMomentum):
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
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``momentum_buffer`` (per element), ``step``. Sums per step: ‖w‖², ‖g‖², one all-reduce if sharded.

    Source: Algorithm 1 of the paper; the momentum forms from the reference code named above.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        nesterov: bool = False,
        momentum_form: str = "scaled",
        **common: Unpack[CommonOptions],
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
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_range("trust_coefficient", group["trust_coefficient"], 0.0, low_open=True)
        check_range("eps", group["eps"], 0.0)
        check_flag("nesterov", group["nesterov"])
        check_choice("momentum_form", group["momentum_form"], MOMENTUM_FORMS)
        if group["nesterov"] and not group["momentum"]:
            raise ValueError(f"nesterov=True needs momentum in (0, 1), got {group['momentum']!r}")

    def accumulates(self, group: dict[str, Any]) -> str | None:
        return ACCUMULATES[group["momentum_form"]]

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        rule = TrustRule(
            layers.adapt,
            scales="step" if group["momentum_form"] == "unscaled" else "factor",
            coefficient=group["trust_coefficient"],
            weight=group["weight_decay"],
            gradient=1.0,
            constant=group["eps"],
        )
        yield Sums("w", "g", of=self.update(group, layers), rules=[rule])
        layers.trust_ratio = rule(layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        lr, ratio = group["lr"], layers.trust_ratio
        ones = torch.ones_like(ratio)
        # What enters v, and what multiplies v in the weight's update.
        factor, step = {
            "scaled": (lr * ratio, ones),
            "gradient": (ratio, lr * ones),
            "unscaled": (ones, lr * ratio),
        }[group["momentum_form"]]
        return MomentumUpdate(group["momentum"], group["weight_decay"], factor, step, nesterov=group["nesterov"])
