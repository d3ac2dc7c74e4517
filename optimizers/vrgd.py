"""VRGD: gradients scaled by their signal-to-noise ratio (Jiang et al. 2023, arXiv 2309.13681)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_choice, check_range, check_update_clip
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import AdamUpdate, Gsnr, MomentumUpdate, TrustRule
from .lamb import LAMB
from .lars import LARS
from .layerwise import LayerwiseAdam, LayerwiseMomentum, LayerwiseOptimizer
from .options.common import CommonOptions

__all__ = ["VRLAMB", "VRLARS", "VRSGD", "VRAdam"]

SECOND_MOMENTS = ("adapted", "mean")


class VarianceReduced(LayerwiseOptimizer):
    r"""Base of the VR optimizers: r, the gradient signal-to-noise ratio (GSNR) of every element.

    With g_i the gradients of k groups of samples (a group is one rank's one micro-batch) and g their mean:

        σ² = (1/k) Σᵢgᵢ² - g²        r = g² / (σ² + εg²)
        r ← clamp(r / mean of r over the layer, gsnr_floor, 1)

    The variance is the biased one and never below zero. ε is the resolution of the dtype in which gradients are added
    up (the parameter's), since g² is known no better: 1.2e-7 in fp32, 7.8e-3 in bf16. It bounds r by 1/ε and leaves
    r = 1 everywhere in a layer whose groups agree. An element without gradient has r = 0, so gsnr_floor.

    Groups of all ranks whose gradients are averaged count. Where no wrapper does that, see `data_parallel_group`.
    """

    group_statistics = "squares"

    def accumulates(self, group: dict[str, Any]) -> str | None:
        return None  # adapted gradients, which nobody else has

    def check_gsnr(self, group: dict[str, Any]) -> None:
        check_range("gsnr_floor", group["gsnr_floor"], 0.0, 1.0, low_open=True)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        yield self.signal_to_noise(group, layers)

    def signal_to_noise(self, group: dict[str, Any], layers: LayerTable) -> Stage:
        return Sums("r", "g", of=Gsnr(group["gsnr_floor"], layers.resolution, scale=torch.ones_like(layers.step)))

    def gsnr(self, group: dict[str, Any], layers: LayerTable) -> Gsnr:
        """The ratio, normalised by its mean over the layer and clipped."""
        total = layers.total("r")
        scale = torch.where(total == 0, torch.ones_like(total), layers.elements / total)
        return Gsnr(group["gsnr_floor"], layers.resolution, scale)


class VRSGD(VarianceReduced, LayerwiseMomentum):
    r"""SGD on the mean gradient times its signal-to-noise ratio; with momentum, VR-Momentum.

    With r as in `VarianceReduced`:

        d = r·g + λw        v ← μv + d        w ← w - lr · v

    The multipliers are at most 1 and mostly well below, so the best learning rate is about two to three times the one
    of plain SGD.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate lr ≥ 0; a float or a tensor.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0; decay is not multiplied by r.
        gsnr_floor: Lower bound of r, in (0, 1]; the paper's γ. 1 gives plain SGD.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.
        StatisticsError: At a step whose group gradients were never seen.

    State: ``momentum_buffer`` with momentum (per element), ``step``. Sums per step: Σr, ‖g‖², one all-reduce if
    sharded. The groups' squares are reduced besides: what the gradient's own reduction sends, once more (see
    `GradientStatistics`). Warns once if there are fewer than 8 groups per step, as the paper demands.

    Source: Algorithm 1 of the paper, whose r has no guard against division by zero. Where weight decay enters is not
    said there.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        gsnr_floor: float = 0.1,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "gsnr_floor": gsnr_floor,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        self.check_gsnr(group)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        yield from super().stages(group, layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        ones = torch.ones_like(layers.step)
        gsnr = self.gsnr(group, layers)
        return MomentumUpdate(group["momentum"], group["weight_decay"], ones, step=group["lr"] * ones, gsnr=gsnr)


class VRLARS(VarianceReduced, LARS):
    r"""LARS on the mean gradient times its signal-to-noise ratio.

    With r as in `VarianceReduced`, every g in `LARS` is r·g, also in the trust ratio: its denominator is ‖r·g‖ + λ‖w‖.

    Args:
        gsnr_floor: Lower bound of r, in (0, 1]; the paper's γ. 1 gives LARS.
        params, lr, momentum, weight_decay, trust_coefficient, eps, nesterov, momentum_form, adapt: As in `LARS`.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.
        StatisticsError: At a step whose group gradients were never seen.

    State: as `LARS`. Sums per step: Σr; then ‖w‖², ‖r·g‖²: two all-reduces if sharded, and the reduction of the
    groups' squares (see `VRSGD`).

    Source: the paper's text, "adapt the gradient mean before applying" LARS. That the ratio takes the norm of the
    adapted gradient is a reading of it.
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
        gsnr_floor: float = 0.1,
        **common: Unpack[CommonOptions],
    ):
        LayerwiseOptimizer.__init__(
            self,
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "eps": eps,
                "nesterov": nesterov,
                "momentum_form": momentum_form,
                "gsnr_floor": gsnr_floor,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        LARS.check(self, group)
        self.check_gsnr(group)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        yield from VarianceReduced.stages(self, group, layers)
        yield from LARS.stages(self, group, layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        return replace(LARS.update(self, group, layers), gsnr=self.gsnr(group, layers))


class VRMoments(VarianceReduced):
    """Base of VRAdam and VRLAMB: running averages of r and of the moments of the adapted gradient."""

    @property
    def element_state(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "exp_avg_gsnr")

    def check_moments(self, group: dict[str, Any]) -> None:
        self.check_gsnr(group)
        check_range("gsnr_beta", group["gsnr_beta"], 0.0, 1.0, high_open=True)
        check_choice("second_moment", group["second_moment"], SECOND_MOMENTS)

    def adapted(self, update: AdamUpdate, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        """The update with r·g in place of g, r averaged over the steps."""
        return replace(
            update,
            gsnr=self.gsnr(group, layers),
            gsnr_beta=group["gsnr_beta"],
            correction3=1 - group["gsnr_beta"] ** layers.step,
            second_moment=group["second_moment"],
        )


class VRAdam(VRMoments, LayerwiseAdam):
    r"""Adam on the mean gradient times a running average of its signal-to-noise ratio.

    With r as in `VarianceReduced`:

        p ← β₃p + (1-β₃)r        h = g · p/(1-β₃ᵗ)
        m ← β₁m + (1-β₁)h        v ← β₂v + (1-β₂)h²        (second_moment="mean": g² in place of h²)
        w ← w - lr · [ m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε) + λw ]

    With ``second_moment="adapted"`` Adam divides a constant multiplier out again: only its change over time matters,
    and the first step is the one of Adam. With ``"mean"`` the multiplier scales the step itself.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        gsnr_beta: β₃ in [0, 1).
        eps: ε ≥ 0, outside the root.
        weight_decay: λ ≥ 0, decoupled as in AdamW.
        gsnr_floor: Lower bound of r, in (0, 1]; the paper's γ. 1 gives Adam.
        second_moment: See above.
        update_clip: Divide the step of each layer by max(1, RMS / update_clip), where RMS² is the layer's mean of
            h²/max(v̂, ε²), with ``"mean"`` of g² in place of h². ``trust_ratios()`` is 1 / max(1, RMS / update_clip)
            then. None: off. Not in the paper.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.
        StatisticsError: At a step whose group gradients were never seen.

    State: ``exp_avg``, ``exp_avg_sq``, ``exp_avg_gsnr`` (p; per element), ``step``. Sums per step: Σr, ‖g‖², one
    all-reduce if sharded, and the reduction of the groups' squares (see `VRSGD`); with ``update_clip`` a second
    all-reduce, since r comes first.

    Source: the paper's text has the running average of r and adapts the gradient before both moments, which is
    "adapted". Its algorithm box was not at hand: the bias correction of p and where decay enters are unverified.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        gsnr_beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gsnr_floor: float = 0.1,
        second_moment: str = "adapted",
        update_clip: float | None = None,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "gsnr_beta": gsnr_beta,
                "eps": eps,
                "weight_decay": weight_decay,
                "gsnr_floor": gsnr_floor,
                "second_moment": second_moment,
                "update_clip": update_clip,
            },
            **common,
        )

    newer_options = ("update_clip",)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        self.check_moments(group)
        check_update_clip(group["update_clip"])

    def modernize(self, group: dict[str, Any]) -> None:
        group.setdefault("update_clip", None)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        yield from super().stages(group, layers)
        if group["update_clip"] is not None:
            rule = TrustRule.of_clip(layers, group["update_clip"])
            yield Sums("g", of=self.update(group, layers), rules=[rule])
            layers.trust_ratio = rule(layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        beta1, beta2 = group["betas"]
        adam = AdamUpdate(
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=group["lr"] * layers.trust_ratio,
            correction1=1 - beta1**layers.step,
            correction2=1 - beta2**layers.step,
            gain=1 - beta1,
            clips=group["update_clip"] is not None,
        )
        return self.adapted(adam, group, layers)


class VRLAMB(VRMoments, LAMB):
    r"""LAMB on the mean gradient times a running average of its signal-to-noise ratio.

    The direction u is that of `VRAdam`, λw included; the trust ratio is ‖w‖/‖u‖ as in `LAMB`.

    Args:
        gsnr_beta: β₃ in [0, 1), as in `VRAdam`.
        gsnr_floor: Lower bound of r, in (0, 1]; the paper's γ. 1 gives LAMB.
        second_moment: "adapted" or "mean", as in `VRAdam`.
        update_clip: As in `LAMB`; of the adapted gradient, with ``second_moment="mean"`` of the mean one.
        max_grad_norm: As in `LAMB`: clips the mean gradient before it is adapted; r does not change by it.
        params, lr, betas, eps, weight_decay, bias_correction, grad_averaging, trust_bounds, adapt: As in `LAMB`.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: As `LAMB`.
        StatisticsError: At a step whose group gradients were never seen.

    State: that of `LAMB` and ``exp_avg_gsnr``. Sums per step: Σr, ‖g‖²; then ‖w‖², ‖u‖²: two all-reduces if sharded,
    with or without ``max_grad_norm``, and the reduction of the groups' squares (see `VRSGD`).

    Source: the paper's text: "similar to VR-Adam" plus layer-wise rates. See `VRAdam` for what is a reading.
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
        gsnr_beta: float = 0.9,
        gsnr_floor: float = 0.1,
        second_moment: str = "adapted",
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
                "trust_bounds": trust_bounds,
                "gsnr_beta": gsnr_beta,
                "gsnr_floor": gsnr_floor,
                "second_moment": second_moment,
                "update_clip": update_clip,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        LAMB.check(self, group)
        self.check_moments(group)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        if group["max_grad_norm"] is None:
            yield self.signal_to_noise(group, layers)
        yield from LAMB.stages(self, group, layers)

    def gradient_norm(self, group: dict[str, Any], layers: LayerTable) -> Stage:
        """Where LAMB clips, the sum of r rides in the all-reduce of the gradient's norm."""
        return self.signal_to_noise(group, layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        return self.adapted(LAMB.update(self, group, layers), group, layers)
