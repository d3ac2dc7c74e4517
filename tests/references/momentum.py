"""References of the momentum family: see `tests/reference.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from .common import Tensor, is_adapted, signal_to_noise_ratio
from .rounding import kept


def lars(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    nesterov: bool = False,
    momentum_form: str = "scaled",
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    w_norm, g_norm = w.norm().item(), g.norm().item()
    q = 1.0
    if is_adapted(w, adapt) and w_norm > 0 and g_norm > 0:
        q = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
    d = g + weight_decay * w
    v = state.get("v", torch.zeros_like(w))
    if momentum_form == "scaled":
        increment, outside = lr * q * d, 1.0
    elif momentum_form == "gradient":
        increment, outside = q * d, lr
    else:
        increment, outside = d, lr * q
    (v,) = kept(state, v=momentum * v + increment)
    update = momentum * v + increment if nesterov else v
    return w - outside * update, q


def sngm(
    w: Tensor, g: Tensor, state: dict[str, Any], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> tuple[Tensor, float]:
    u = momentum * state.get("u", torch.zeros_like(w)) + (g + weight_decay * w) / state["model_gradient_norm"]
    (u,) = kept(state, u=u)
    return w - lr * u, 1.0


def tvlars(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    decay: float = 0.01,
    delay: float = 0,
    alpha: float = 1.0,
    floor: float = 0.0,
    form: str = "paper",
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    t = state["t"] = state.get("t", 0) + 1
    d = g + weight_decay * w
    w_norm, g_norm, d_norm = w.norm().item(), g.norm().item(), d.norm().item()
    q = 1.0
    if is_adapted(w, adapt) and w_norm > 0 and g_norm > 0 and d_norm > 0:
        if form == "released":
            q = trust_coefficient / (0.1 + math.exp(decay * t)) * min(w_norm, 10) / min(d_norm, 10)
        else:
            phi = 1 / (alpha + math.exp(decay * (t - delay))) + floor
            q = trust_coefficient * phi * w_norm / (g_norm + weight_decay * w_norm)
    v = momentum * state.get("v", torch.zeros_like(w)) + q * d
    (v,) = kept(state, v=v)
    return w - lr * v, q


def mclr(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    steps = sorted(
        abs(a) / (abs(b) + weight_decay * abs(a) + eps)
        for a, b in zip(w.flatten().tolist(), g.flatten().tolist(), strict=True)
        if b != 0
    )
    median = steps[(len(steps) - 1) // 2]
    q = median if is_adapted(w, adapt) and median > 0 else 1.0
    v = momentum * state.get("v", torch.zeros_like(w)) + lr * q * (g + weight_decay * w)
    (v,) = kept(state, v=v)
    return w - v, q


def cblr(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    statistic: str = "median",
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    known = g != 0
    ratios = w[known].abs() / (g[known].abs() + weight_decay * w[known].abs() + eps)
    if statistic == "median":
        q = ratios.sort().values[(len(ratios) - 1) // 2]
    elif statistic == "mean":
        q = ratios.mean()
    else:
        q = w.norm() / (g.norm() + weight_decay * w.norm() + eps)
    ratio = q.item() if is_adapted(w, adapt) and q > 0 else 1.0
    v = momentum * state.get("v", torch.zeros_like(w)) + lr * ratio * (g + weight_decay * w)
    (v,) = kept(state, v=v)
    return w - v, ratio


def clars(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.01,
    statistic: str = "norm",
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    norms = [g_i.norm().item() for g_i in state["group_gradients"]]
    single = sum(norms) / len(norms)
    if statistic == "square":
        single = sum(norm**2 for norm in norms) / len(norms) / g.norm().item()
    q = 1.0
    if is_adapted(w, adapt) and w.norm() > 0:
        q = trust_coefficient * w.norm().item() / (single + weight_decay * w.norm().item())
    v = momentum * state.get("v", torch.zeros_like(w)) + lr * q * (g + weight_decay * w)
    (v,) = kept(state, v=v)
    return w - v, q


def vrsgd(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    gsnr_floor: float = 0.1,
) -> tuple[Tensor, float]:
    d = signal_to_noise_ratio(state, g, gsnr_floor) * g + weight_decay * w
    (v,) = kept(state, v=momentum * state.get("v", torch.zeros_like(w)) + d)
    return w - lr * v, 1.0


def vrlars(
    w: Tensor, g: Tensor, state: dict[str, Any], *, gsnr_floor: float = 0.1, **options: Any
) -> tuple[Tensor, float]:
    return lars(w, signal_to_noise_ratio(state, g, gsnr_floor) * g, state, **options)


def novograd(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.95, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_averaging: bool = False,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    squared = g.square().sum()
    v = beta2 * state["v"] + (1 - beta2) * squared if "v" in state else squared
    d = g / (v.sqrt() + eps) + weight_decay * w
    if grad_averaging:
        d = (1 - beta1) * d
    m = beta1 * state["m"] + d if "m" in state else d
    state["v"] = v
    (m,) = kept(state, m=m)
    return w - lr * m, 1.0


def curvature_sgd(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    cap: float = 1.0,
    adapt: bool | None = True,
    interval: int | None = None,
) -> tuple[Tensor, float]:
    """Without samples."""
    ratio = min(1.0, cap) if is_adapted(w, adapt) else 1.0
    (v,) = kept(state, v=momentum * state.get("v", torch.zeros_like(w)) + g + weight_decay * w)
    return w - lr * ratio * v, ratio
