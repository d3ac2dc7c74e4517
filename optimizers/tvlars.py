"""TVLARS: LARS whose trust coefficient decays along a sigmoid in place of a warm-up (Do et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_choice, check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import MomentumUpdate
from .layerwise import LayerwiseMomentum
from .options.common import CommonOptions

__all__ = ["TVLARS"]

FORMS = ("paper", "released")
RELEASED_ALPHA = 0.1
RELEASED_LARGEST_NORM = 10.0


class TVLARS(LayerwiseMomentum):
    r"""LARS whose ratio starts large and decays with the step t = 1, 2, …; no warm-up is used.

    With d = g + λw, and the ratio q = 1 for layers that are not adapted and where a norm is zero:

    - ``form="paper"``:

          φ_t = 1 / (α + exp(κ(t - t_d))) + φ_min          q = η φ_t ‖w‖ / (‖g‖ + λ‖w‖)

    - ``form="released"``, the authors' code:

          φ_t = 1 / (0.1 + exp(κt))                        q = η φ_t min(‖w‖, 10) / min(‖d‖, 10)

    Both: v ← μv + q·d, w ← w - lr·v. φ falls from about 1/(α + exp(-κ t_d)) to φ_min. The released φ falls to zero, so
    training stops unless κ times the number of steps is small; its bound of 10 on both norms is in no text.

    t counts the updates of the layer itself; it is kept in ``step`` and equals the number of optimizer steps for every
    layer that gets a gradient each time. (The released code counts calls of the optimizer.)

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        trust_coefficient: η > 0.
        decay: κ ≥ 0, how fast φ falls per step.
        delay: t_d ≥ 0, the step at which φ is half way down (for α = 1); paper form only.
        alpha: α > 0; paper form only. The released code has 0.1.
        floor: φ_min ≥ 0; paper form only.
        form: See above.
        adapt: Which layers the ratio scales: all (True), none (False), or those of two or more dimensions (None). Also
            a group option.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range, or ``form="released"`` meets a delay, an alpha or a floor, none of
            which that code has.

    State: ``momentum_buffer`` (per element), ``step``. Sums per step: ‖w‖², ‖g‖², ‖d‖², one all-reduce if
    sharded.

    Source: arXiv 2309.14053. The released form follows opt/tvlars.py of KhoiDOO/tvlars and agrees with its results.
    The paper form is unverified: φ_t is written down from second-hand accounts; its constants, the count from 1, the
    denominator (here as in `LARS`, the sum of norms) and the momentum (here as in the released code) may differ. Paper
    and released code do disagree about delay and floor; an earlier revision (10bcfd2) steps with LARS's ratio for 10
    epochs before φ_t begins.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        decay: float = 0.01,
        delay: float = 0,
        alpha: float = 1.0,
        floor: float = 0.0,
        form: str = "paper",
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "decay": decay,
                "delay": delay,
                "alpha": alpha,
                "floor": floor,
                "form": form,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_range("trust_coefficient", group["trust_coefficient"], 0.0, low_open=True)
        check_range("decay", group["decay"], 0.0)
        check_range("delay", group["delay"], 0.0)
        check_range("alpha", group["alpha"], 0.0, low_open=True)
        check_range("floor", group["floor"], 0.0)
        check_choice("form", group["form"], FORMS)
        if group["form"] == "released":
            for name, allowed in (("delay", (0,)), ("alpha", (1.0, RELEASED_ALPHA)), ("floor", (0.0,))):
                if group[name] not in allowed:
                    raise ValueError(
                        f'{name} must be left at its default with form="released", whose code has none or a fixed one, '
                        f"got {group[name]!r}"
                    )

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        yield Sums("w", "g", "d", of=self.update(group, layers))
        w_norm, g_norm, d_norm = layers.norm("w"), layers.norm("g"), layers.norm("d")
        if group["form"] == "released":
            phi = 1 / (RELEASED_ALPHA + torch.exp(group["decay"] * layers.step))
            numerator, denominator = (norm.clamp(max=RELEASED_LARGEST_NORM) for norm in (w_norm, d_norm))
        else:
            phi = 1 / (group["alpha"] + torch.exp(group["decay"] * (layers.step - group["delay"]))) + group["floor"]
            numerator, denominator = w_norm, g_norm + group["weight_decay"] * w_norm
        # Not `safe_ratio`: φ may have fallen to zero, which is no reason to take a full step.
        usable = layers.adapt & (w_norm != 0) & (denominator != 0) & (g_norm != 0)
        scaled = group["trust_coefficient"] * phi * numerator / denominator
        layers.trust_ratio = torch.where(usable, scaled, torch.ones_like(scaled))

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        ratio = layers.trust_ratio
        return MomentumUpdate(
            group["momentum"], group["weight_decay"], ratio, step=group["lr"] * torch.ones_like(ratio)
        )
