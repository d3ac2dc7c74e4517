"""What references of several optimizers have in common."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


def is_adapted(w: Tensor, adapt: bool | None) -> bool:
    return w.dim() >= 2 if adapt is None else adapt


def signal_to_noise_ratio(state: dict[str, Any], g: Tensor, gsnr_floor: float) -> Tensor:
    """The VRGD multipliers; `state["resolution"]` is the epsilon of the dtype in which gradients are added up."""
    squares = torch.stack([g_i * g_i for g_i in state["group_gradients"]]).mean(dim=0)
    variance = (squares - g * g).clamp(min=0)
    r = g * g / (variance + state["resolution"] * g * g + 1e-30)
    return (r / r.mean()).clamp(gsnr_floor, 1.0)
