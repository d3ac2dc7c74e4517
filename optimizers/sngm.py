"""SNGM: stochastic normalised gradient descent with momentum (Zhao, Xie, Li 2020, arXiv 2007.13985)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import MomentumUpdate
from .layerwise import LayerwiseMomentum
from .options.common import CommonOptions

__all__ = ["SNGM"]


class SNGM(LayerwiseMomentum):
    r"""SGD with momentum over the gradient divided by the norm of the whole model's gradient.

        u ← βu + (g + λw) / ‖g‖          w ← w - lr · u

    ‖g‖ is taken over all layers of all groups, after any clipping by a wrapper (which the division undoes). Without
    weight decay an update is never longer than lr/(1-β). A gradient that is zero everywhere changes nothing. There is
    no per-layer ratio: ``trust_ratios()`` is 1 for all.

    Where one ``step()`` call sees only a part of the model (DeepSpeed ZeRO-1/2/3), ‖g‖ is what the wrapper has
    computed for the step, corrected for its clipping and loss scale.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        momentum: β in [0, 1).
        weight_decay: λ ≥ 0.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.
        LayoutError: At a step whose wrapper does not know the norm of the whole model's gradient; the message says
            which setting to change.

    State: ``momentum_buffer`` (per element), ``step``. Sums per step: ‖g‖² per layer, one all-reduce if sharded.

    Source: Algorithm 1 of the paper as another text gives it, without decay; neither the paper nor official code was at
    hand, so it is unverified. The gradient contains the L2 term here, but ‖g‖ is the norm without it: under ZeRO no
    ``step()`` call can know the norm of the sum.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
            **common,
        )

    def needs_model_norm(self, group: dict[str, Any]) -> bool:
        return True

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        yield Sums("g")
        norm = layers.model_gradient_norm()
        # With an infinite norm only the infinite elements would become NaN: a step must not be half applied.
        norm = torch.where(norm.isfinite(), norm, torch.nan)
        layers.g_norm = norm.expand_as(layers.step)

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        ones = torch.ones_like(layers.g_norm)
        return MomentumUpdate(group["momentum"], group["weight_decay"], 1 / layers.g_norm, step=group["lr"] * ones)
