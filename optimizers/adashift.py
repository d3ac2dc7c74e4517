"""AdaShift: a second moment of gradients that the first one does not have (Zhou et al. 2018, arXiv 1810.00143)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from .formulas.chunk_view import ChunkView
from .formulas.chunks import Summand, largest, squares
from .formulas.hyperparameters import check_betas, check_choice, check_count, check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums, maxima_over_layers, sums_over_layers
from .formulas.updates import TrustRule
from .layerwise import LayerwiseOptimizer
from .options.common import CommonOptions
from .sharding.layout import Layout

__all__ = ["AdaShift"]

REDUCTIONS = ("max", "mean", None)
PAST = "past_gradient_"


class AdaShift(LayerwiseOptimizer):
    r"""Adam whose second moment is made of gradients that are n steps old, and has one number per layer.

    The gradients of the last n steps are kept. In a layer's first n steps nothing else happens. After them, with
    k = t - n and t the layer's own count of steps:

        v ← β₂v + (1-β₂) φ(g²_{t-n})          φ: the largest or the mean square of the layer, or each element's own
        m = Σᵢ β₁ⁱ g_{t-i} / Σᵢ β₁ⁱ           i = 0, ..., n-1
        u = m / (√(v / (1-β₂ᵏ)) + ε) + λw     the quotient is 0 where v is
        w ← w - lr · q · u                    q = 1, or with ``adapt`` LAMB's ‖w‖/‖u‖

    m is that of the window, computed anew in each step, so that no gradient is in both m and v.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor. With "max" about ten times that of None is reported to serve.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, outside the root.
        keep: n ≥ 1, the number of gradients that are kept; the same in all groups. It cannot change once there are any.
        reduction: φ: "max" or "mean" over the whole layer, or None for none. None in all groups, or in no group.
        adapt: Which layers the ratio q scales: none (False, as published), all (True), or those of two or more
            dimensions (None). Also a group option.
        weight_decay: λ ≥ 0, inside u and so inside the ratio. The authors' code has none: unverified, as in AdamW.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range, or groups differ in what they keep; at a step, if ``keep`` or
            ``reduction`` has changed so that the state is another one.

    State: ``past_gradient_0`` (the newest) to ``past_gradient_{n-1}`` (per element), ``step`` (per layer), and
    ``exp_avg_sq``: per layer, with ``reduction=None`` per element. Numbers per step: the largest g²_{t-n} and g², or
    Σg²_{t-n} and ‖g‖², or ‖g‖² alone: one all-reduce if sharded. Unless ``adapt`` is False another one, of ‖w‖², ‖u‖².

    Source: the authors' code (QingruZhang/AdaShift_Release, optimizer_all.py). Other codes have a running average for
    m, which keeps an error of its first steps.
    """

    vector_options = ("lr", "weight_decay")  # with adapt=False less is measured

    def __init__(  # type: ignore[misc]  # `adapt` has another default than in CommonOptions
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        keep: int = 10,
        reduction: str | None = "max",
        adapt: bool | None = False,
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "keep": keep,
                "reduction": reduction,
                "adapt": adapt,
                "weight_decay": weight_decay,
            },
            **common,
        )

    refused_options: ClassVar[Mapping[str, str]] = {
        "update_clip": "its second moment is of gradients that are `keep` steps old, and so lags behind by design"
    }

    plan_options = (*LayerwiseOptimizer.plan_options, "keep", "reduction")

    @property
    def element_state(self) -> tuple[str, ...]:
        group = self.param_groups[0]
        return (*_past_gradients(group["keep"]), *(("exp_avg_sq",) if group["reduction"] is None else ()))

    @property
    def layer_state(self) -> tuple[str, ...]:
        return ("step",) if self.param_groups[0]["reduction"] is None else ("step", "exp_avg_sq")

    def check(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_betas(group["betas"])
        check_range("eps", group["eps"], 0.0)
        check_count("keep", group["keep"])
        check_choice("reduction", group["reduction"], REDUCTIONS)
        check_range("weight_decay", group["weight_decay"], 0.0)
        self._refuse_other_groups()

    def _refuse_other_groups(self) -> None:
        """Groups whose layers would have state of other names or shapes."""
        first, *others = self.param_groups
        for other in others:
            if other["keep"] != first["keep"]:
                raise ValueError(
                    "keep must be the same in every group, "
                    f"got {first['keep']!r} in one and {other['keep']!r} in another"
                )
            if (other["reduction"] is None) != (first["reduction"] is None):
                raise ValueError(
                    "reduction must be None in every group or in none, "
                    f"got {first['reduction']!r} in one and {other['reduction']!r} in another"
                )

    def check_layout(self, layout: Layout) -> None:
        keep, reduction = self.param_groups[0]["keep"], self.param_groups[0]["reduction"]
        for tensor in layout.tensors:
            state = self.state.get(tensor, {})
            kept = [name for name in state if name.startswith(PAST)]
            if kept and len(kept) != keep:
                raise ValueError(
                    f"keep={keep} cannot go on from a state of {len(kept)} gradients: leave keep as it was, or begin "
                    "anew with optimizer.state.clear()"
                )
            of_layers = _is_of_layers(state, tensor)
            if of_layers is not None and of_layers == (reduction is None):
                raise ValueError(
                    f"reduction={reduction!r} cannot go on from a second moment per "
                    f"{'layer' if of_layers else 'element'}: leave reduction as it was, or begin anew with "
                    "optimizer.state.clear()"
                )

    # The step

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        _, beta2 = group["betas"]
        layers.step = layers.step + 1
        layers.is_full = layers.moves = layers.step > group["keep"]
        layers.correction = 1 - beta2 ** (layers.step - group["keep"]).clamp(min=1)
        yield self.old_squares(group)
        if group["reduction"] is not None:
            old = layers.total("old")
            if group["reduction"] == "mean":
                old = old / layers.elements
            layers.exp_avg_sq = beta2 * layers.exp_avg_sq + (1 - beta2) * old
            # Zero until the window is full, and never after: no gradient that is kept is zero everywhere.
            layers.denominator = (layers.exp_avg_sq / layers.correction).sqrt() + group["eps"]
        if group["adapt"] is not False:
            yield self.norms
            layers.trust_ratio = TrustRule(layers.adapt, direction=1.0)(layers)

    def old_squares(self, group: dict[str, Any]) -> Stage:
        """What is measured of g_{t-n}, which is zero until there is one, and of g."""
        if group["reduction"] is None:
            return Sums("g")
        stage: Stage = self.sums_of_squares
        if group["reduction"] == "max":
            stage = self.largest_squares if self.statistics is None else self.largest_square_and_norm
        return stage

    @maxima_over_layers("old", "g")
    def largest_squares(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return largest(self.oldest(group, x)), largest(x.g)

    @maxima_over_layers("old")
    @sums_over_layers("g")
    def largest_square_and_norm(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        """For whoever watches single groups' gradients: their sums take an all-reduce anyway."""
        return squares(x.g), largest(self.oldest(group, x))

    @sums_over_layers("old", "g")
    def sums_of_squares(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return squares(self.oldest(group, x)), squares(x.g)

    @sums_over_layers("w", "u")
    def norms(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return squares(x.w), squares(self.direction(group, layers, x))

    def direction(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        """u, and 0 in layers whose window is not full."""
        m = self.window(group, x)
        if group["reduction"] is None:
            _, beta2 = group["betas"]
            old = self.oldest(group, x)
            x.exp_avg_sq.mul_(beta2).addcmul_(old, old, value=1 - beta2)
            v = x.kept("exp_avg_sq")
            denominator = (v / x.of(layers.correction)).sqrt_().add_(group["eps"])
            u = torch.where(v == 0, torch.zeros_like(m), m.div_(denominator))
        else:
            u = m.div_(x.of(layers.denominator))
        u = x.plus(u, x.w, group["weight_decay"], out=u)
        return torch.where(x.of(layers.is_full), u, torch.zeros_like(u))

    def window(self, group: dict[str, Any], x: ChunkView) -> torch.Tensor:
        """m, of the gradient and the newest n-1 of those that are kept."""
        beta1, _ = group["betas"]
        weights = [beta1**age for age in range(group["keep"])]
        newest, *older = [weight / sum(weights) for weight in weights]
        m: torch.Tensor = x.g * newest
        for weight, name in zip(older, _past_gradients(group["keep"]), strict=False):
            m.add_(getattr(x, name), alpha=weight)
        return m

    def oldest(self, group: dict[str, Any], x: ChunkView) -> torch.Tensor:
        *_, name = _past_gradients(group["keep"])
        oldest: torch.Tensor = getattr(x, name)
        return oldest

    def change(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        change = self.direction(group, layers, x).mul_(x.of(group["lr"] * layers.trust_ratio))
        past = [getattr(x, name) for name in _past_gradients(group["keep"])]
        for older, newer in zip(reversed(past), [*reversed(past[:-1]), x.g], strict=True):
            older.copy_(newer)
        return change


def _past_gradients(keep: int) -> tuple[str, ...]:
    """Names of the gradients that are kept, the newest first."""
    return tuple(f"{PAST}{age}" for age in range(keep))


def _is_of_layers(state: dict[str, Any], tensor: torch.Tensor) -> bool | None:
    """Whether the second moment in a tensor's state has a number per layer; None if there is none, or no difference."""
    if "exp_avg_sq" in state.get("layers", {}):
        return True
    moment = state.get("exp_avg_sq")
    return None if moment is None or tensor.dim() == 0 else moment.shape != tensor.shape
