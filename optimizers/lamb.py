"""LAMB: layer-wise Adam for large batches (You et al. 2019, arXiv 1904.00962), and LAMBC, its clipped form.

This file says which numbers enter the formula. What runs for every element, m ← β₁m + (1-β₁)g and the lines after it,
is `AdamUpdate.directions` in formulas/updates.py; the ratio ‖w‖/‖u‖ is `TrustRule` beside it. Compiled kernels follow
both term by term (kernels/).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_bounds, check_flag, check_range, check_update_clip, is_number
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import AdamUpdate, TrustRule
from .layerwise import LayerwiseAdam, LayerwiseOptimizer
from .options.common import CommonOptions
from .sharding.layout import Layout

__all__ = ["LAMB", "LAMBC"]


class LAMB(LayerwiseAdam):
    r"""Adam whose step is scaled per layer by ‖w‖ / ‖u‖.

    With g the gradient (divided by max(1, ‖g‖/max_grad_norm) over the whole model if that is set):

        m ← β₁m + (1-β₁)g            v ← β₂v + (1-β₂)g²
        u = m̂ / (√v̂ + ε) + λw        w ← w - lr · clamp(‖w‖/‖u‖, trust_bounds) · u

    where m̂ = m/(1-β₁ᵗ) and v̂ = v/(1-β₂ᵗ). The ratio is 1 where ‖w‖ or ‖u‖ is zero and for layers that are not
    adapted. φ is the identity: the paper's experiments use it; its "10" was a cap on the ratio, not on ‖w‖.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, outside the root.
        weight_decay: λ ≥ 0, inside u and so inside the ratio.
        bias_correction: Divide m and v as above; False drops both corrections (the paper's first versions, DeepSpeed's
            BERT recipe).
        grad_averaging: False adds g instead of (1-β₁)g to m.
        max_grad_norm: Clip the whole model's gradient norm first; adds a second all-reduce where layers are sharded.
            Refused under a wrapper that clips itself (DeepSpeed ZeRO: set ``gradient_clipping`` there). None: off.
        trust_bounds: (low, high) for the ratio of adapted layers, with 0 ≤ low ≤ high.
        update_clip: Divide the step of each layer, adapted or not, by max(1, RMS / update_clip), after the ratio, which
            would undo it: RMS² is the layer's mean of g²/max(v̂, ε²), g as v has it. 1 is Adafactor's and StableAdamW's;
            None: off. Not in the paper; needs ``bias_correction``, or the first steps were divided by up to 1/√(1-β₂).
        adapt: Which layers the ratio scales: all (True, "NVLAMB"), none (False: AdamW with decay inside lr), or those
            of two or more dimensions (None). Also a group option; it never depends on weight decay.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range, or options contradict each other; at the first step if
            ``max_grad_norm`` meets such a wrapper.

    State: ``exp_avg``, ``exp_avg_sq`` (per element), ``step``. Sums per step: ‖w‖², ‖u‖², ‖g‖², with ``update_clip``
    one more; one all-reduce if sharded, two with ``max_grad_norm``. ``trust_ratios()`` reports what scales lr, so the
    ratio divided by max(1, RMS / update_clip) where that is set.

    Source: Algorithm 2 of the paper (v5); options as in apex's FusedLAMB, checked against timm's ``Lamb``.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = None,
        trust_bounds: tuple[float, float] = (0.0, math.inf),
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
                "bias_correction": bias_correction,
                "grad_averaging": grad_averaging,
                "max_grad_norm": max_grad_norm,
                "trust_bounds": trust_bounds,
                "update_clip": update_clip,
            },
            **common,
        )

    newer_options = ("update_clip",)
    plan_options = (*LayerwiseAdam.plan_options, "max_grad_norm")

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_flag("bias_correction", group["bias_correction"])
        check_flag("grad_averaging", group["grad_averaging"])
        if group["max_grad_norm"] is not None:
            check_range("max_grad_norm", group["max_grad_norm"], 0.0, low_open=True)
        check_update_clip(group["update_clip"])
        if group["update_clip"] is not None and not group["bias_correction"]:
            raise ValueError(
                f"update_clip={group['update_clip']!r} needs bias_correction=True, got False: without it the second "
                "moment is too small at first, and every layer would be clipped"
            )
        self._refuse_several_limits(range(len(self.param_groups)))
        self.check_bounds(group)

    def check_bounds(self, group: dict[str, Any]) -> None:
        """Raise ValueError if the options that bound the ratio are out of range."""
        check_bounds("trust_bounds", group["trust_bounds"])

    def bounds(self, group: dict[str, Any]) -> tuple[float, float]:
        """The least and the largest ratio of an adapted layer."""
        low, high = group["trust_bounds"]
        return low, high

    def accumulates(self, group: dict[str, Any]) -> str | None:
        return "gradient" if group["grad_averaging"] else "gradient / (1 - beta1)"

    def check_layout(self, layout: Layout) -> None:
        self._refuse_several_limits(layout.groups)
        for group in layout.groups:
            limit = self.param_groups[group]["max_grad_norm"]
            if layout.clips_with and limit is not None:
                raise ValueError(
                    f"max_grad_norm={limit!r} cannot be used under {layout.backend}, where a step() call need not see "
                    f"the whole model's gradient: set {layout.clips_with} to that value and leave max_grad_norm at "
                    "None, in every group and in what is loaded into them"
                )

    def _refuse_several_limits(self, groups: Iterable[int]) -> None:
        limits = [self.param_groups[group]["max_grad_norm"] for group in groups]
        different = [limit for limit in limits if limit != limits[0]]
        if different:
            raise ValueError(
                "max_grad_norm clips the whole model, so every group must have the same, "
                f"got {limits[0]!r} in one and {different[0]!r} in another"
            )

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.clip = torch.ones_like(layers.step)
        if group["max_grad_norm"] is not None:
            yield self.gradient_norm(group, layers)
            layers.clip = (layers.model_norm("g") / group["max_grad_norm"]).clamp(min=1.0).expand_as(layers.step)
        layers.step = layers.step + 1
        rule = TrustRule(layers.adapt, direction=1.0, bounds=self.bounds(group), update_clip=group["update_clip"])
        yield Sums("w", "u", "g", of=self.update(group, layers), rules=[rule])
        layers.trust_ratio = rule(layers)

    def needs_model_norm(self, group: dict[str, Any]) -> bool:
        return group["max_grad_norm"] is not None

    def gradient_norm(self, group: dict[str, Any], layers: LayerTable) -> Stage:
        return Sums("g")

    def update(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        beta1, beta2 = group["betas"]
        ones = torch.ones_like(layers.step)
        return AdamUpdate(
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=group["lr"] * layers.trust_ratio,
            correction1=1 - beta1**layers.step if group["bias_correction"] else ones,
            correction2=1 - beta2**layers.step if group["bias_correction"] else ones,
            gain=1 - beta1 if group["grad_averaging"] else 1.0,
            scale=None if group["max_grad_norm"] is None else 1 / layers.clip,
            clips=group["update_clip"] is not None,
        )

    def modernize(self, group: dict[str, Any]) -> None:
        group.setdefault("update_clip", None)


class LAMBC(LAMB):
    r"""LAMB whose trust ratio is at most ``trust_clip`` (Fong, Chen, Chen 2020, arXiv 2011.13584).

    The ratio is clipped after the guard against zero norms, from above only, as in the authors' code
    (jeffrey-fong/LAMBC). That code drops the bias correction: pass ``bias_correction=False`` for it.

    Args:
        trust_clip: Upper bound of the ratio, > 0. The authors' constructor has 10, their recipes 1.
        params, lr, betas, eps, weight_decay, bias_correction, grad_averaging, max_grad_norm, update_clip, adapt: As in
            `LAMB`.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: As `LAMB`.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = None,
        trust_clip: float = 1.0,
        update_clip: float | None = None,
        **common: Unpack[CommonOptions],
    ):
        LayerwiseOptimizer.__init__(
            self,
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "grad_averaging": grad_averaging,
                "max_grad_norm": max_grad_norm,
                "trust_clip": trust_clip,
                "update_clip": update_clip,
            },
            **common,
        )

    def check_bounds(self, group: dict[str, Any]) -> None:
        clip = group["trust_clip"]
        if not (is_number(clip) and clip == math.inf):
            check_range("trust_clip", clip, 0.0, low_open=True)

    def bounds(self, group: dict[str, Any]) -> tuple[float, float]:
        return 0.0, group["trust_clip"]

    def modernize(self, group: dict[str, Any]) -> None:
        super().modernize(group)
        if "trust_clip" not in group and "trust_bounds" in group:
            _, group["trust_clip"] = group.pop("trust_bounds")
