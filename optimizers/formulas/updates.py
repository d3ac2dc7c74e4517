"""Descriptions of element-wise updates: numbers per layer and the formulas that use them.

An algorithm says what happens to an element by one of these descriptions, and so does not care who computes it. The
formulas are written here, over `ChunkView`s; compiled implementations follow them term by term. Vectors have one fp64
entry per layer of a parameter group, shape (layers,), on the device of the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from .chunk_view import ChunkView
from .chunks import Summand, squares, values
from .layer_table import LayerTable, safe_ratio

__all__ = [
    "AdamUpdate",
    "BeliefUpdate",
    "Gsnr",
    "Measurable",
    "MomentumUpdate",
    "Number",
    "TrustRule",
    "Update",
    "is_zero",
]

Number = float | torch.Tensor
"""One number for all layers of a group, or a vector where joined groups differ: `Algorithm.vector_options`."""

SMALLEST_VARIANCE = 1e-30  # an element whose gradients are all zero has r = 0
SMALLEST_ROOT = torch.finfo(torch.float32).tiny  # and c = 0, also where ε is


def is_zero(number: Number) -> bool:
    """Whether it is one number, zero; of a vector that is not asked, since it would wait for the device."""
    return not isinstance(number, torch.Tensor) and number == 0


class Measurable(Protocol):
    """Something with elements whose sums per layer can be measured."""

    def measure(self, x: ChunkView) -> dict[str, Summand]:
        """Everything that can be measured, by name, with the state updated in the view's scratch copy."""


class Update(Measurable, Protocol):
    """What happens to an element."""

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the element-wise state that it reads and writes, in the order of its formula."""

    def change(self, x: ChunkView) -> torch.Tensor:
        """Update the state in `x` and return what is subtracted from the weights."""


@dataclass(frozen=True, eq=False)
class TrustRule:
    r"""How a layer's ratio follows from its norms.

        ratio = coefficient·‖w‖ / (weight·‖w‖ + gradient·‖g‖ + direction·‖u‖ + constant)

    It is 1 where the numerator, the denominator or ‖g‖ is zero; then it is kept within `bounds`. Layers that are not
    adapted have 1. With `update_clip` the ratio of every layer, adapted or not, is divided by max(1, RMS / update_clip)
    in the end, where RMS² is the sum "c" of the layer by the number of its elements. NaN stays NaN. Norms whose factor
    is zero are left out. All is fp64, added in the order above.

    Attributes:
        adapt: Vector of booleans: the layers that are adapted.
        scales: Name of the update's vector that the ratio multiplies.
        coefficient: See above.
        weight: See above; a number or a vector, as is `coefficient` where a step is not taken in one go.
        gradient: See above.
        direction: See above.
        direction_name: Name of u among the sums.
        constant: See above.
        bounds: (low, high).
        update_clip: See above; None for no clip.
    """

    adapt: torch.Tensor
    scales: str = "step"
    coefficient: Number = 1.0
    weight: Number = 0.0
    gradient: float = 0.0
    direction: float = 0.0
    direction_name: str = "u"
    constant: float = 0.0
    bounds: tuple[float, float] = (0.0, math.inf)
    update_clip: float | None = None

    def __call__(self, layers: LayerTable) -> torch.Tensor:
        """Return the ratio of each layer, of sums that are complete."""
        ratio = self.of_norms(layers)
        return ratio if self.update_clip is None else ratio / self.excess(layers, self.update_clip)

    @classmethod
    def of_clip(cls, layers: LayerTable, update_clip: float) -> TrustRule:
        """The rule of an update that is clipped and has no ratio of norms."""
        return cls(torch.zeros_like(layers.adapt), coefficient=0.0, update_clip=update_clip)

    def excess(self, layers: LayerTable, update_clip: float) -> torch.Tensor:
        """By how much each layer's update is too large: max(1, RMS / update_clip)."""
        return ((layers.total("c") / layers.elements).sqrt() / update_clip).clamp(min=1.0)

    def of_norms(self, layers: LayerTable) -> torch.Tensor:
        """The ratio before the clip."""
        numerator = torch.zeros_like(layers.total("g"))
        if not is_zero(self.coefficient):
            numerator = _multiple(self.coefficient, layers.norm("w"))
        denominator = torch.zeros_like(numerator)
        for name, factor in (("w", self.weight), ("g", self.gradient), (self.direction_name, self.direction)):
            if not is_zero(factor):
                denominator = denominator + _multiple(factor, layers.norm(name))
        ratio = safe_ratio(numerator, denominator + self.constant, self.adapt & (layers.total("g") != 0))
        return torch.where(self.adapt, ratio.clamp(*self.bounds), ratio)


def _multiple(factor: Number, norms: torch.Tensor) -> torch.Tensor:
    """Their product, 0 where the factor is, of an infinite norm too."""
    product = factor * norms
    return torch.where(factor == 0, torch.zeros_like(product), product) if isinstance(factor, torch.Tensor) else product


@dataclass(frozen=True, eq=False)
class Gsnr:
    r"""The gradient signal-to-noise ratio of every element, of the gradient as it comes.

        r = g² / (max(σ² - g², 0) + resolution·g²)        σ² the groups' mean square, `x.mean_square`

    Attributes:
        floor: Lower bound of the ratio once it is multiplied by `scale`; the upper one is 1.
        resolution: Vector; bounds r by its inverse.
        scale: Vector: 1 over the mean of r in the layer. 1 while that is not known.
    """

    floor: float
    resolution: torch.Tensor
    scale: torch.Tensor

    def raw(self, x: ChunkView) -> torch.Tensor:
        signal = x.g.square()
        variance = (x.mean_square - signal).clamp_(min=0)
        return signal / variance.add_(signal * x.of(self.resolution)).add_(SMALLEST_VARIANCE)

    def __call__(self, x: ChunkView) -> torch.Tensor:
        return self.raw(x).mul_(x.of(self.scale)).clamp_(self.floor, 1.0)

    def measure(self, x: ChunkView) -> dict[str, Summand]:
        """Sum "r" of the raw ratio, and "g"."""
        return {"r": values(self.raw(x)), "g": squares(x.g)}


@dataclass(frozen=True, eq=False)
class MomentumUpdate:
    r"""SGD with momentum and numbers per layer; what LARS and its relatives are.

        d = scale·g + λw             g times r with `gsnr`
        v ← μv + a·d                 kept in `buffer`; without momentum v = a·d
        w ← w - step·v               with Nesterov, a·d + μv in place of v

    Attributes:
        momentum: μ; zero keeps no state.
        weight_decay: λ; a number or a vector.
        factor: Vector a.
        step: Vector.
        scale: Vector, or None for 1.
        nesterov: See above.
        gsnr: Adapts the gradient.
        buffer: Name of v in the state.
    """

    momentum: float
    weight_decay: Number
    factor: torch.Tensor
    step: torch.Tensor
    scale: torch.Tensor | None = None
    nesterov: bool = False
    gsnr: Gsnr | None = None
    buffer: str = "momentum_buffer"

    @property
    def state(self) -> tuple[str, ...]:
        return (self.buffer,) if self.momentum else ()

    def gradient(self, x: ChunkView) -> torch.Tensor:
        return x.g if self.gsnr is None else self.gsnr(x).mul_(x.g)

    def direction(self, x: ChunkView, g: torch.Tensor) -> torch.Tensor:
        """Return d, of the gradient g."""
        return x.plus(g if self.scale is None else g * x.of(self.scale), x.w, self.weight_decay)

    def measure(self, x: ChunkView) -> dict[str, Summand]:
        """Sums of squares: "w", "g" (adapted) and "d"."""
        g = self.gradient(x)
        return {"w": squares(x.w), "g": squares(g), "d": squares(self.direction(x, g))}

    def change(self, x: ChunkView) -> torch.Tensor:
        increment = self.direction(x, self.gradient(x)).mul_(x.of(self.factor))
        if not self.momentum:
            return increment.mul_(x.of(self.step))
        getattr(x, self.buffer).mul_(self.momentum).add_(increment)
        v = x.kept(self.buffer)
        return (increment.add_(v, alpha=self.momentum) if self.nesterov else v) * x.of(self.step)


@dataclass(frozen=True, eq=False)
class AdamUpdate:
    r"""Adam with numbers per layer; what LAMB and its relatives are.

        g' = scale·g                 h = g', or with `gsnr`:  p ← β₃p + (1-β₃)r,  h = p/correction3 · g'
        m ← β₁m + gain·h             v ← β₂v + (1-β₂)h²          g'² in place of h² with `second_moment="mean"`
        d = √(v/correction2) + ε
        u = m/correction1 / d + λw
        w ← w - step·u - outside·w   with a second direction u_g = g'/d + λw:  - second_step·u_g besides
        c = h / max(√(v/correction2), ε)    g' in place of h if v is made of that

    m, v and p are `exp_avg`, `exp_avg_sq` and `exp_avg_gsnr`. When sums of u or c are measured, everything but `step`
    and `second_step` must be known: state may be written then.

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        weight_decay: λ; a number or a vector.
        step: Vector.
        correction1: Vector, 1-β₁ᵗ or 1.
        correction2: Vector, 1-β₂ᵗ or 1.
        gain: 1-β₁ or 1.
        scale: Vector, or None for 1.
        second_step: Vector; None for no second direction.
        gsnr: Adapts the gradient.
        gsnr_beta: β₃.
        correction3: Vector, 1-β₃ᵗ.
        second_moment: "adapted" or "mean".
        outside: Vector, the decay beside u; None for none.
        clips: Whether the sum "c" of c² can be measured, of which `TrustRule.update_clip` makes the layer's RMS.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: Number
    step: torch.Tensor
    correction1: torch.Tensor
    correction2: torch.Tensor
    gain: float
    scale: torch.Tensor | None = None
    second_step: torch.Tensor | None = None
    gsnr: Gsnr | None = None
    gsnr_beta: float = 0.0
    correction3: torch.Tensor | None = None
    second_moment: str = "adapted"
    outside: torch.Tensor | None = None
    clips: bool = False

    @property
    def state(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") if self.gsnr is None else ("exp_avg", "exp_avg_sq", "exp_avg_gsnr")

    def adapted(self, x: ChunkView, g: torch.Tensor) -> torch.Tensor:
        """Return h, with the running average of r updated."""
        if self.gsnr is None:
            return g
        assert self.correction3 is not None
        x.exp_avg_gsnr.mul_(self.gsnr_beta).add_(self.gsnr(x), alpha=1 - self.gsnr_beta)
        return x.kept("exp_avg_gsnr") / x.of(self.correction3) * g

    def directions(self, x: ChunkView, *, clips: bool = False) -> dict[str, torch.Tensor]:
        """Directions "u", with a second one "u_g", and if wanted "c", with all averages updated."""
        beta1, beta2 = self.betas
        g = x.g if self.scale is None else x.g * x.of(self.scale)
        h = self.adapted(x, g)
        second = h if self.second_moment == "adapted" else g
        x.exp_avg.mul_(beta1).add_(h, alpha=self.gain)
        x.exp_avg_sq.mul_(beta2).addcmul_(second, second, value=1 - beta2)
        m, v = x.kept("exp_avg"), x.kept("exp_avg_sq")
        root = (v / x.of(self.correction2)).sqrt_()
        found = {"c": second / root.clamp(min=max(self.eps, SMALLEST_ROOT))} if clips else {}
        d = root.add_(self.eps)
        u = (m / x.of(self.correction1)).div_(d)
        found["u"] = x.plus(u, x.w, self.weight_decay, out=u)
        if self.second_step is not None:
            u_g = g / d
            found["u_g"] = x.plus(u_g, x.w, self.weight_decay, out=u_g)
        return found

    def measure(self, x: ChunkView) -> dict[str, Summand]:
        """Sums of squares: "w", "g" (as it comes), "u", and where there are, "u_g" and "c"."""
        directions = {name: squares(direction) for name, direction in self.directions(x, clips=self.clips).items()}
        return {"w": squares(x.w), "g": squares(x.g), **directions}

    def change(self, x: ChunkView) -> torch.Tensor:
        found = self.directions(x)
        change = found["u"].mul_(x.of(self.step))
        if self.second_step is not None:
            change.add_(found["u_g"].mul_(x.of(self.second_step)))
        return change if self.outside is None else change.add_(x.w * x.of(self.outside))


@dataclass(frozen=True, eq=False)
class BeliefUpdate:
    r"""AdaBelief with numbers per layer; FastAdaBelief too.

        g' = g + l2·w
        m ← β₁m + (1-β₁)g'           s ← β₂s + rate·(g' - m)² + growth       with the new m
        ŝ = s, or with `maximum`  ŝ ← max(ŝ, s)
        d = √(ŝ·scale) + offset      without `root`  ŝ·scale + offset
        u = factor·m / d + λw
        w ← w - step·u - fixed_decay·w

    m, s and ŝ are `exp_avg`, `exp_avg_var` and `max_exp_avg_var`. A layer that steps by m alone has scale 0 and offset
    1. When sums of u are measured, everything but `step` must be known: state may be written then.

    Attributes:
        beta1: β₁.
        beta2: Vector β₂.
        rate: Vector, 1-β₂.
        growth: See above.
        scale: Vector.
        offset: Vector.
        factor: Vector.
        step: Vector.
        root: See above.
        maximum: See above.
        weight_decay: λ; a number or a vector.
        l2: See above; likewise.
        fixed_decay: See above; likewise.
    """

    beta1: float
    beta2: torch.Tensor
    rate: torch.Tensor
    growth: float
    scale: torch.Tensor
    offset: torch.Tensor
    factor: torch.Tensor
    step: torch.Tensor
    root: bool = True
    maximum: bool = False
    weight_decay: Number = 0.0
    l2: Number = 0.0
    fixed_decay: Number = 0.0

    @property
    def state(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_var", *(("max_exp_avg_var",) if self.maximum else ()))

    def variance(self, x: ChunkView, g: torch.Tensor) -> torch.Tensor:
        """Return ŝ, with all averages updated."""
        # β₁ times the difference to the old m, which has more digits than the difference to the new one.
        surprise = (g - x.exp_avg).mul_(self.beta1)
        x.exp_avg.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        x.exp_avg_var.mul_(x.of(self.beta2)).add_(surprise.square_().mul_(x.of(self.rate))).add_(self.growth)
        s = x.kept("exp_avg_var")
        return torch.maximum(x.max_exp_avg_var, s, out=x.max_exp_avg_var) if self.maximum else s

    def direction(self, x: ChunkView) -> torch.Tensor:
        """Return u, with all averages updated."""
        g = x.g if is_zero(self.l2) else x.plus(x.g, x.w, self.l2)
        d = self.variance(x, g) * x.of(self.scale)
        d = (d.sqrt_() if self.root else d).add_(x.of(self.offset))
        u = (x.kept("exp_avg") * x.of(self.factor)).div_(d)
        return x.plus(u, x.w, self.weight_decay, out=u)

    def measure(self, x: ChunkView) -> dict[str, Summand]:
        """Sums of squares: "w", "g" (as it comes) and "u"."""
        return {"w": squares(x.w), "g": squares(x.g), "u": squares(self.direction(x))}

    def change(self, x: ChunkView) -> torch.Tensor:
        change = self.direction(x).mul_(x.of(self.step))
        return x.plus(change, x.w, self.fixed_decay, out=change)
