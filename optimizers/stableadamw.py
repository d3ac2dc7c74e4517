"""StableAdamW: AdamW whose update is clipped per layer (Wortsman et al. 2023, arXiv 2304.13013)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_choice, check_update_clip
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import AdamUpdate, TrustRule
from .layerwise import LayerwiseAdam
from .options.common import CommonOptions

__all__ = ["StableAdamW"]

DECAY_FORMS = ("clipped", "unclipped", "fixed")


class StableAdamW(LayerwiseAdam):
    r"""AdamW whose rate falls in a layer where the gradient has outgrown its second moment.

        m ← β₁m + (1-β₁)g            v ← β₂v + (1-β₂)g²
        RMS = √( mean over the layer of g² / max(v̂, ε²) )
        r = lr / max(1, RMS / update_clip)
        w ← w - r · ( m̂ / (√v̂ + ε) + λw )

    where m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ) and t is the layer's own count of updates. Averages with debiased β's, as other
    codes have them, are m̂ and v̂ themselves. RMS is about 1 while v keeps up with the gradient; it is that of the whole
    layer, however the layer is cut.

    Every layer is clipped, biases and norm weights too: ``adapt`` says nothing here. ``trust_ratios()`` reports
    1 / max(1, RMS / update_clip). As published it takes the place of gradient clipping, which a wrapper may still do.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, outside the root. With 0 an element that never had a gradient becomes NaN, as in AdamW.
        weight_decay: λ ≥ 0.
        update_clip: The RMS up to which nothing is clipped, > 0; None for none at all, which is AdamW.
        decay_form: "clipped" multiplies λw by the clipped rate r, as above; "unclipped" by lr, as AdamW does; "fixed"
            by neither, so that λ itself is what a step takes away. Unverified, but for "clipped".
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``exp_avg``, ``exp_avg_sq`` (per element), ``step``: those of AdamW. Sums per step: Σ g²/max(v̂, ε²) and
    ‖g‖², one all-reduce if sharded.

    Source: optimi's documentation and code (torch-optimi 0.3.3), with whose steps this agrees. Its ``decouple_lr=True``
    is "clipped" with weight_decay / max_lr. Clipping by RMS is Adafactor's (arXiv 1804.04235, section 6).
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        update_clip: float | None = 1.0,
        decay_form: str = "clipped",
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "update_clip": update_clip,
                "decay_form": decay_form,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_update_clip(group["update_clip"])
        check_choice("decay_form", group["decay_form"], DECAY_FORMS)

    def accumulates(self, group: dict[str, Any]) -> str | None:
        return "gradient"

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        clip = group["update_clip"]
        if clip is None:
            yield Sums("g")
            return
        rule = TrustRule.of_clip(layers, clip)
        yield Sums("g", of=self.update(group, layers), rules=[rule])
        layers.trust_ratio = rule(layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        beta1, beta2 = group["betas"]
        decay, form = group["weight_decay"], group["decay_form"]
        ones = torch.ones_like(layers.step)
        return AdamUpdate(
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=decay if form == "clipped" else 0.0,
            step=group["lr"] * layers.trust_ratio,
            correction1=1 - beta1**layers.step,
            correction2=1 - beta2**layers.step,
            gain=1 - beta1,
            outside=None if form == "clipped" else decay * (ones if form == "fixed" else group["lr"] * ones),
            clips=group["update_clip"] is not None,
        )
