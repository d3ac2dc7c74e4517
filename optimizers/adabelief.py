"""AdaBelief (Zhuang et al. 2020, arXiv 2010.07468), and FastAdaBelief for strongly convex losses (arXiv 2104.13790).

This file says which numbers enter the formula, which is `BeliefUpdate` in formulas/updates.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_betas, check_flag, check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import BeliefUpdate, TrustRule
from .layerwise import LayerwiseOptimizer
from .options.common import CommonOptions

__all__ = ["AdaBelief", "FastAdaBelief"]


class Belief(LayerwiseOptimizer):
    """Base of both: the trust ratio, where it is wanted, and the count of updates."""

    refused_options: ClassVar[Mapping[str, str]] = {
        "update_clip": "its second moment is small where gradients agree, so that g/√s is large just where it is meant "
        "to step far"
    }

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        if group["adapt"] is False:
            yield Sums("g")
            return
        update = self.update(group, layers)
        # Where the direction is the decay alone, a ratio would undo how small that is.
        rule = TrustRule(layers.adapt & (update.factor != 0), direction=1.0)
        yield Sums("w", "u", "g", of=update, rules=[rule])
        layers.trust_ratio = rule(layers)

    def update(self, group: dict[str, Any], layers: LayerTable) -> BeliefUpdate:
        raise NotImplementedError(f"{type(self).__name__} must define update(): what happens to an element")


class AdaBelief(Belief):
    r"""Adam that divides by how far gradients are from their running mean, not from zero.

        m ← β₁m + (1-β₁)g            s ← β₂s + (1-β₂)(g - m)² + ε             with the new m; ε adds up in s
        u = r · m̂ / d + λw           w ← w - lr · q · u

    where m̂ = m/(1-β₁ᵗ) and t is the layer's own count of updates. With ``rectify``, as in RAdam, ρ∞ = 2/(1-β₂) - 1,
    ρ = ρ∞ - 2tβ₂ᵗ/(1-β₂ᵗ), and

        ρ ≥ 5:  d = √s + ε,  r = √( (1-β₂ᵗ) · (ρ-4)/(ρ∞-4) · (ρ-2)/ρ · ρ∞/(ρ∞-2) )
        ρ < 5:  d = 1,  r = 1, or 0 without ``degenerated_to_sgd``          with β₂ = 0.999 up to t = 5

    Without it d = √(s/(1-β₂ᵗ)) + ε and r = 1. q is 1, or with ``adapt`` LAMB's ‖w‖/‖u‖ where r is not 0.

    The first steps are those of SGD with m̂: at ``lr`` they are as long as the gradient, not of Adam's length. The
    authors advise ε = 1e-16 for transformers and GANs, 1e-8 where SGD does better than Adam, and no element-wise
    clipping of gradients. Where gradients have no noise, s and so the steps' stability rest on ε alone.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, in s and outside the root; about the square of Adam's.
        weight_decay: λ ≥ 0. Decoupled it is in u, as above, and so inside the ratio.
        rectify: See above.
        decoupled: False adds λw to g instead (L2), before m.
        fixed_decay: Decay by λw, times neither lr nor the ratio, and outside of u; needs ``decoupled``.
        amsgrad: Divide by the largest s so far; needs ``rectify=False``, since the rectified step of the authors' code
            does not look at it.
        adapt: Which layers the ratio q scales: none (False, as published), all (True), or those of two or more
            dimensions (None). Also a group option.
        degenerated_to_sgd: See above; False takes no step where ρ < 5 (but decays).
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range, or options contradict each other.

    State: ``exp_avg``, ``exp_avg_var``, with amsgrad ``max_exp_avg_var`` (per element), ``step``. Sums per step:
    ‖g‖², and unless ``adapt`` is False ‖w‖² and ‖u‖² with it: one all-reduce if sharded.

    Source: the authors' code, adabelief_pytorch 0.2.0 (juntang-zhuang/Adabelief-Optimizer). The ratio is LAMB's and not
    in the paper.
    """

    vector_options = ("lr", "weight_decay")  # with adapt=False less is measured

    def __init__(  # type: ignore[misc]  # `adapt` has another default than in CommonOptions
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        rectify: bool = True,
        decoupled: bool = True,
        fixed_decay: bool = False,
        amsgrad: bool = False,
        adapt: bool | None = False,
        degenerated_to_sgd: bool = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rectify": rectify,
                "decoupled": decoupled,
                "fixed_decay": fixed_decay,
                "amsgrad": amsgrad,
                "adapt": adapt,
                "degenerated_to_sgd": degenerated_to_sgd,
            },
            **common,
        )

    @property
    def element_state(self) -> tuple[str, ...]:
        amsgrad = any(group["amsgrad"] for group in self.param_groups)
        return ("exp_avg", "exp_avg_var", *(("max_exp_avg_var",) if amsgrad else ()))

    def check(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_betas(group["betas"])
        check_range("eps", group["eps"], 0.0)
        check_range("weight_decay", group["weight_decay"], 0.0)
        for name in ("rectify", "decoupled", "fixed_decay", "amsgrad", "degenerated_to_sgd"):
            check_flag(name, group[name])
        if group["amsgrad"] and group["rectify"]:
            raise ValueError(
                "amsgrad=True needs rectify=False: the rectified step does not look at the largest variance"
            )
        if group["fixed_decay"]:
            if not group["decoupled"]:
                raise ValueError("fixed_decay=True needs decoupled=True: with L2 the decay is a part of the gradient")
            check_range("weight_decay", group["weight_decay"], 0.0, 1.0)

    def update(self, group: dict[str, Any], layers: LayerTable) -> BeliefUpdate:
        beta1, beta2 = group["betas"]
        ones = torch.ones_like(layers.step)
        correction1, correction2 = 1 - beta1**layers.step, 1 - beta2**layers.step
        factor, scale, offset = 1 / correction1, 1 / correction2, group["eps"] * ones
        if group["rectify"]:
            length = length_of_average(beta2, layers.step)
            is_rectified = length >= 5
            without = 1.0 if group["degenerated_to_sgd"] else 0.0
            factor = torch.where(is_rectified, rectification(beta2, length) * correction2.sqrt(), without) / correction1
            layers.moves = factor != 0
            scale, offset = is_rectified * ones, torch.where(is_rectified, offset, ones)
        decay, outside = group["weight_decay"], group["fixed_decay"]
        return BeliefUpdate(
            beta1=beta1,
            beta2=beta2 * ones,
            rate=(1 - beta2) * ones,
            growth=group["eps"],
            scale=scale,
            offset=offset,
            factor=factor,
            step=group["lr"] * layers.trust_ratio,
            maximum=group["amsgrad"],
            weight_decay=decay if group["decoupled"] and not outside else 0.0,
            l2=0.0 if group["decoupled"] else decay,
            fixed_decay=decay if outside else 0.0,
        )


class FastAdaBelief(Belief):
    r"""AdaBelief without root and bias correction, whose rate falls as 1/t: for strongly convex losses.

        m ← β₁m + (1-β₁)g            s ← β₂s + (1-β₂)(g - m)²       β₂ = 1 - γ/t, and with the new m
        ŝ ← max(ŝ, s)                u = m / (ŝ + δ/t)               w ← w - (lr/t) · q · u

    t is the layer's own count of updates. q is 1, or with ``adapt`` LAMB's ‖w‖/‖u‖.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0, the paper's α; a float or a tensor.
        beta1: β₁ in [0, 1).
        gamma: γ in (0, 1].
        delta: δ > 0.
        weight_decay: λ ≥ 0, added to g as λw before m (L2).
        adapt: Which layers the ratio q scales: none (False, as published), all (True), or those of two or more
            dimensions (None). Also a group option.
        constant_lr: Another reading: the rate is lr in every step, and 1/t falls in the denominator alone.
        running_maximum: False divides by s itself, as one of the codes does.
        decoupled: Another reading: λw is added to u, and so inside the ratio, and not to g.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``exp_avg``, ``exp_avg_var``, with the running maximum ``max_exp_avg_var`` (per element), ``step``.
    Sums per step: as `AdaBelief`.

    Source: unverified; neither the paper (arXiv 2104.13790) nor its authors' code was at hand. Three codes of others
    agree in m, s and the missing root. They differ in the rate (evanatyourservice/FastAdaBelief-optax has it constant),
    in the running maximum (two of three have it) and in δ (0.01 or 1e-4).
    """

    vector_options = ("lr", "weight_decay")  # with adapt=False less is measured

    def __init__(  # type: ignore[misc]  # `adapt` has another default than in CommonOptions
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        beta1: float = 0.9,
        gamma: float = 0.9,
        delta: float = 1e-2,
        weight_decay: float = 0.0,
        adapt: bool | None = False,
        constant_lr: bool = False,
        running_maximum: bool = True,
        decoupled: bool = False,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "beta1": beta1,
                "gamma": gamma,
                "delta": delta,
                "weight_decay": weight_decay,
                "adapt": adapt,
                "constant_lr": constant_lr,
                "running_maximum": running_maximum,
                "decoupled": decoupled,
            },
            **common,
        )

    @property
    def element_state(self) -> tuple[str, ...]:
        maximum = any(group["running_maximum"] for group in self.param_groups)
        return ("exp_avg", "exp_avg_var", *(("max_exp_avg_var",) if maximum else ()))

    def check(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_range("beta1", group["beta1"], 0.0, 1.0, high_open=True)
        check_range("gamma", group["gamma"], 0.0, 1.0, low_open=True)
        check_range("delta", group["delta"], 0.0, low_open=True)
        check_range("weight_decay", group["weight_decay"], 0.0)
        for name in ("constant_lr", "running_maximum", "decoupled"):
            check_flag(name, group[name])

    def update(self, group: dict[str, Any], layers: LayerTable) -> BeliefUpdate:
        ones = torch.ones_like(layers.step)
        rate = group["gamma"] / layers.step
        return BeliefUpdate(
            beta1=group["beta1"],
            beta2=1 - rate,
            rate=rate,
            growth=0.0,
            scale=ones,
            offset=group["delta"] / layers.step,
            factor=ones,
            step=group["lr"] * layers.trust_ratio / (1 if group["constant_lr"] else layers.step),
            root=False,
            maximum=group["running_maximum"],
            weight_decay=group["weight_decay"] if group["decoupled"] else 0.0,
            l2=0.0 if group["decoupled"] else group["weight_decay"],
        )


def length_of_average(beta2: float, step: torch.Tensor) -> torch.Tensor:
    """RAdam's ρ: the length of the simple average that has the variance of the exponential one, per layer."""
    return _longest(beta2) - 2 * step * beta2**step / (1 - beta2**step)


def rectification(beta2: float, length: torch.Tensor) -> torch.Tensor:
    """RAdam's factor for averages of length ρ ≥ 5, without the bias correction."""
    longest = _longest(beta2)
    parts = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
    return parts.sqrt()


def _longest(beta2: float) -> float:
    return 2 / (1 - beta2) - 1
