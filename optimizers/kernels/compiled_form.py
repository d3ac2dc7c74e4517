"""Updates and sums in the form that compiled code takes.

An algorithm describes what it wants by an object, an `Update` or `Sums`, with the formula in a method. Compiled code
cannot call that. It has the formulas itself, each under a `Kind`, and needs to be told which one it is, the numbers of
each layer, the numbers that are the same for all, and where the element-wise state is: a `CompiledForm`. What has no
such form is computed by tensor operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from ..formulas.stages import Stage, Sums
from ..formulas.updates import SMALLEST_ROOT, AdamUpdate, BeliefUpdate, Gsnr, MomentumUpdate, TrustRule

__all__ = ["PLACES", "PLACE_OF_SUM", "CompiledForm", "Kind", "compiled_sums", "compiled_update", "targets_of"]

LARGEST = torch.finfo(torch.float32).max

PLACES = 5
"""How many sums of a layer a sweep has places for: of w, of g, of up to two directions, and of c."""

PLACE_OF_SUM = {"w": 0, "g": 1, "u": 2, "d": 2, "r": 2, "u_g": 3, "c": 4}
"""Where a sweep leaves a sum, by its name in `Sums`."""


class Kind(Enum):
    """The formulas that compiled code knows: the first five for sums alone, the others for updates and their sums."""

    SUM_G = "g"
    SUM_W_G = "w, g"
    SUM_W_G_D = "w, g, and g + λw"
    SUM_W_G_GSNR = "w, and g times r"
    SUM_R_G = "r, g"
    MOMENTUM = "MomentumUpdate"
    MOMENTUM_GSNR = "MomentumUpdate with r"
    ADAM = "AdamUpdate"
    LANS = "AdamUpdate with two directions"
    ADAM_GSNR = "AdamUpdate with r"
    ADAM_GSNR_MEAN = "AdamUpdate with r and the mean gradient's second moment"
    BELIEF = "BeliefUpdate"
    BELIEF_MAX = "BeliefUpdate with the largest variance"
    BELIEF_NO_ROOT = "BeliefUpdate without root"
    BELIEF_MAX_NO_ROOT = "BeliefUpdate with the largest variance, without root"

    @property
    def is_adam(self) -> bool:
        """Whether it has moments, which may be kept while sums are measured."""
        return self.is_belief or self in (Kind.ADAM, Kind.LANS, Kind.ADAM_GSNR, Kind.ADAM_GSNR_MEAN)

    @property
    def is_belief(self) -> bool:
        return self in (Kind.BELIEF, Kind.BELIEF_MAX, Kind.BELIEF_NO_ROOT, Kind.BELIEF_MAX_NO_ROOT)

    @property
    def has_gsnr(self) -> bool:
        return self in (Kind.SUM_W_G_GSNR, Kind.SUM_R_G, Kind.MOMENTUM_GSNR, Kind.ADAM_GSNR, Kind.ADAM_GSNR_MEAN)


@dataclass
class CompiledForm:
    """An update, or sums, without its Python: which formula, and every number in it.

    Attributes:
        kind: Which formula.
        state: Names of the element-wise state that it reads and writes: first, second, third.
        vectors: fp32, shape (layers of the group,) each, by the names in cpu_kernels.c and triton_kernels.py; those
            that are missing are zero.
        scalars: The same for all layers.
    """

    kind: Kind
    state: tuple[str, ...] = ()
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)

    def add_vectors(self, **vectors: torch.Tensor | None) -> None:
        for name, vector in vectors.items():
            if vector is not None:
                # The inverse of a subnormal norm is finite in fp64 alone.
                self.vectors[name] = vector.clamp(-LARGEST, LARGEST).to(torch.float32).contiguous()

    def add_numbers(self, like: torch.Tensor, **numbers: float | torch.Tensor) -> None:
        """Add vectors that may be given as one number for all layers, of which `like` is some vector."""
        for name, number in numbers.items():
            if isinstance(number, torch.Tensor):
                self.add_vectors(**{name: number.expand_as(like)})
            elif number != 0:
                bounded = max(-LARGEST, min(number, LARGEST))
                self.vectors[name] = like.new_full(like.shape, bounded, dtype=torch.float32)

    def add_gsnr(self, gsnr: Gsnr | None) -> None:
        if gsnr is not None:
            self.add_vectors(resolution=gsnr.resolution, gsnr_scale=gsnr.scale)
            self.scalars["gsnr_floor"] = gsnr.floor


def compiled_update(update: Any) -> CompiledForm | None:
    """The form of an update, None if it has none."""
    if isinstance(update, MomentumUpdate):
        return _momentum(update)
    if isinstance(update, AdamUpdate):
        besides = [part for part in (update.gsnr, update.second_step, update.outside) if part is not None]
        return _adam(update) if len(besides) < 2 else None
    if isinstance(update, BeliefUpdate):
        return _belief(update)
    return None


def compiled_sums(stage: Stage) -> CompiledForm | None:
    """The form of a stage's sums, None if it has none."""
    if not isinstance(stage, Sums):
        return None
    names, of = frozenset(stage.names), stage.of
    if isinstance(of, AdamUpdate | BeliefUpdate):
        return compiled_update(of) if names <= {"w", "g", "u", "u_g", "c"} else None
    kind = _kind_of_sums(names, of)
    if kind is None:
        return None
    form = CompiledForm(kind)
    if isinstance(of, Gsnr):
        form.add_gsnr(of)
    elif isinstance(of, MomentumUpdate):
        if kind is Kind.SUM_W_G_D:
            form.add_numbers(of.factor, weight_decay=of.weight_decay)
        form.add_gsnr(of.gsnr)
    return form


def targets_of(update: Any, rule: TrustRule) -> dict[str, tuple[torch.Tensor, float | torch.Tensor | None]]:
    """The vectors of an update's form that follow from a rule's ratio q: of each the fp64 b and the a in b·q·a.

    a is None for 1.
    """
    scaled = getattr(update, rule.scales)
    if rule.scales != "factor":
        return {rule.scales: (scaled, None)}
    gradient_scale = scaled if update.scale is None else scaled * update.scale
    return {"gradient_scale": (gradient_scale, None), "weight_scale": (scaled, update.weight_decay)}


def _kind_of_sums(names: frozenset[str], of: Any) -> Kind | None:
    if isinstance(of, Gsnr):
        return Kind.SUM_R_G if names <= {"r", "g"} else None
    if not (of is None or isinstance(of, MomentumUpdate)):
        return None
    if of is not None and of.gsnr is not None:
        return Kind.SUM_W_G_GSNR if names <= {"w", "g"} else None
    if names <= {"w", "g"}:
        return Kind.SUM_W_G if "w" in names else Kind.SUM_G
    return Kind.SUM_W_G_D if of is not None and of.scale is None and names <= {"w", "g", "d"} else None


def _momentum(update: MomentumUpdate) -> CompiledForm:
    form = CompiledForm(Kind.MOMENTUM if update.gsnr is None else Kind.MOMENTUM_GSNR, update.state)
    form.add_vectors(
        gradient_scale=update.factor if update.scale is None else update.factor * update.scale,
        weight_scale=update.factor * update.weight_decay,
        step=update.step,
    )
    form.scalars = {"beta1": update.momentum, "nesterov": int(update.nesterov)}
    form.add_gsnr(update.gsnr)
    return form


def _adam(update: AdamUpdate) -> CompiledForm:
    kind = Kind.ADAM if update.second_step is None else Kind.LANS
    if update.gsnr is not None:
        kind = Kind.ADAM_GSNR if update.second_moment == "adapted" else Kind.ADAM_GSNR_MEAN
    form = CompiledForm(kind, update.state)
    form.add_vectors(
        gradient_scale=torch.ones_like(update.step) if update.scale is None else update.scale,
        weight_scale=update.outside,
        step=update.step,
        second_step=update.second_step,
        correction1=1 / update.correction1,
        correction2=1 / update.correction2,
        correction3=None if update.correction3 is None else 1 / update.correction3,
    )
    form.scalars = {
        "beta1": update.betas[0],
        "beta2": update.betas[1],
        "beta3": update.gsnr_beta,
        "gain": update.gain,
        "eps": update.eps,
        "smallest_root": max(update.eps, SMALLEST_ROOT) if update.clips else 0.0,
    }
    form.add_numbers(update.step, weight_decay=update.weight_decay)
    form.add_gsnr(update.gsnr)
    return form


def _belief(update: BeliefUpdate) -> CompiledForm:
    if update.root:
        kind = Kind.BELIEF_MAX if update.maximum else Kind.BELIEF
    else:
        kind = Kind.BELIEF_MAX_NO_ROOT if update.maximum else Kind.BELIEF_NO_ROOT
    form = CompiledForm(kind, update.state)
    form.add_vectors(
        step=update.step,
        correction1=update.factor,
        correction2=update.scale,
        decay=update.beta2,
        rate=update.rate,
        offset=update.offset,
    )
    form.scalars = {
        "beta1": update.beta1,
        "gain": 1 - update.beta1,
        "growth": update.growth,
    }
    form.add_numbers(update.step, weight_decay=update.weight_decay, l2=update.l2, fixed_decay=update.fixed_decay)
    return form
