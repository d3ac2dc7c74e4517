"""NovoGrad: momentum of gradients normalised per layer by their running norm (Ginsburg et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_flag
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import MomentumUpdate
from .layerwise import LayerwiseAdam
from .options.common import CommonOptions

__all__ = ["NovoGrad"]


class NovoGrad(LayerwiseAdam):
    r"""SGD with momentum over gradients that are divided by a running norm of their layer.

    The second moment v is one number per layer:

        v ← ‖g‖²  in the layer's first step, then  v ← β₂v + (1-β₂)‖g‖²
        m ← β₁m + [ g / (√v + ε) + λw ]          the bracket times (1-β₁) with ``grad_averaging``
        w ← w - lr · m

    Normalisation applies to every layer, biases included. There is no trust ratio: ``trust_ratios()`` is 1 for all.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, outside the root. (OpenSeq2Seq has it inside.)
        weight_decay: λ ≥ 0, added after normalisation.
        grad_averaging: Scale what is added to m by 1-β₁.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``exp_avg`` (per element); ``exp_avg_sq`` and ``step`` (per layer). The first step is told by the
    layer's own ``step``, never by v = 0, so a layer whose gradient was zero at first starts when it gets one. Sums per
    step: ‖g‖², one all-reduce if sharded.

    Source: arXiv 1905.11286, as in NVIDIA's Jasper example and timm's ``NvNovoGrad``, with whose results it agrees.
    apex's ``FusedNovoGrad`` computes this only with ``reg_inside_moment=True, bias_correction=False,
    grad_averaging=False, init_zero=False``.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    layer_state = ("step", "exp_avg_sq")

    refused_options: ClassVar[Mapping[str, str]] = {
        "update_clip": "its second moment is the whole layer's norm, beside which elements of the gradient are small"
    }

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "grad_averaging": grad_averaging,
            },
            **common,
        )

    @property
    def element_state(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_flag("grad_averaging", group["grad_averaging"])

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        _, beta2 = group["betas"]
        layers.step = layers.step + 1
        yield Sums("g")
        squared = layers.total("g")
        running = beta2 * layers.exp_avg_sq + (1 - beta2) * squared
        layers.exp_avg_sq = torch.where(layers.step == 1, squared, running)
        layers.denominator = layers.exp_avg_sq.sqrt() + group["eps"]

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        beta1, _ = group["betas"]
        ones = torch.ones_like(layers.denominator)
        return MomentumUpdate(
            momentum=beta1,
            weight_decay=group["weight_decay"],
            factor=(1 - beta1 if group["grad_averaging"] else 1.0) * ones,
            step=group["lr"] * ones,
            scale=1 / layers.denominator,
            buffer="exp_avg",
        )
