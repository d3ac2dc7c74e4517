"""References of the Adam family: see `tests/reference.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from .common import Tensor, is_adapted, signal_to_noise_ratio
from .rounding import kept


def lamb(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    trust_bounds: tuple[float, float] = (0.0, math.inf),
    update_clip: float | None = None,
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = beta1 * state.get("m", torch.zeros_like(w)) + ((1 - beta1) if grad_averaging else 1.0) * g
    v = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g * g
    m, v = kept(state, m=m, v=v)
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
    u = (m / c1) / ((v / c2).sqrt() + eps) + weight_decay * w
    w_norm, u_norm = w.norm().item(), u.norm().item()
    ratio = 1.0
    if is_adapted(w, adapt):
        ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
        ratio = min(max(ratio, trust_bounds[0]), trust_bounds[1])
    ratio = ratio / excess(g, v / c2, eps, update_clip)
    return w - lr * ratio * u, ratio


def lambc(
    w: Tensor, g: Tensor, state: dict[str, Any], *, trust_clip: float = 1.0, **options: Any
) -> tuple[Tensor, float]:
    return lamb(w, g, state, trust_bounds=(0.0, trust_clip), **options)


def lans(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    normalize_grad: bool = True,
    update_clip: float | None = None,
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    if normalize_grad:
        g = g / g.norm()
    m = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
    v = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g * g
    m, v = kept(state, m=m, v=v)
    d = (v / (1 - beta2**t)).sqrt() + eps
    u_m = m / (1 - beta1**t) / d + weight_decay * w
    u_g = g / d + weight_decay * w
    ratio_m = ratio_g = 1.0
    if is_adapted(w, adapt) and w.norm() > 0:
        ratio_m = (w.norm() / u_m.norm()).item() if u_m.norm() > 0 else 1.0
        ratio_g = (w.norm() / u_g.norm()).item() if u_g.norm() > 0 else 1.0
    too_large = excess(g, v / (1 - beta2**t), eps, update_clip)
    return w - lr / too_large * (beta1 * ratio_m * u_m + (1 - beta1) * ratio_g * u_g), ratio_m / too_large


def cowclip(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ratio: float = 1.0,
    zeta: float = 1e-5,
    threshold: str = "code",
    cowclip: bool = False,
    counts: list[int] | None = None,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    d = g + weight_decay * w
    if cowclip:
        assert counts is not None
        rows = []
        for row, w_row, n in zip(d, w, counts, strict=True):
            n = max(n, 1)
            if threshold == "code":
                bound = ratio * n * max(w_row.norm().item(), ratio * math.sqrt(w.shape[1]) * zeta)
            else:
                bound = n * max(ratio * w_row.norm().item(), zeta)
            rows.append(row * (bound / max(row.norm().item(), bound)) if bound > 0 else torch.zeros_like(row))
        d = torch.stack(rows)
    m = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * d
    v = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * d * d
    m, v = kept(state, m=m, v=v)
    return w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps), 1.0


def vrlamb(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    trust_bounds: tuple[float, float] = (0.0, math.inf),
    gsnr_beta: float = 0.9,
    gsnr_floor: float = 0.1,
    second_moment: str = "adapted",
    update_clip: float | None = None,
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    r = signal_to_noise_ratio(state, g, gsnr_floor)
    (p,) = kept(state, p=gsnr_beta * state.get("p", torch.zeros_like(w)) + (1 - gsnr_beta) * r)
    h = p / (1 - gsnr_beta**t) * g
    for_v = h if second_moment == "adapted" else g
    m = beta1 * state.get("m", torch.zeros_like(w)) + ((1 - beta1) if grad_averaging else 1.0) * h
    v = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * for_v * for_v
    m, v = kept(state, m=m, v=v)
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
    u = (m / c1) / ((v / c2).sqrt() + eps) + weight_decay * w
    ratio = 1.0
    if is_adapted(w, adapt):
        ratio = (w.norm() / u.norm()).item() if w.norm() > 0 and u.norm() > 0 else 1.0
        ratio = min(max(ratio, trust_bounds[0]), trust_bounds[1])
    ratio = ratio / excess(for_v, v / c2, eps, update_clip)
    return w - lr * ratio * u, ratio


def vradam(
    w: Tensor, g: Tensor, state: dict[str, Any], *, eps: float = 1e-8, weight_decay: float = 0.0, **options: Any
) -> tuple[Tensor, float]:
    return vrlamb(w, g, state, eps=eps, weight_decay=weight_decay, adapt=False, **options)


def curvature_adamw(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    cap: float = 0.1,
    adapt: bool | None = True,
) -> tuple[Tensor, float]:
    """Without samples."""
    ratio = min(1.0, cap) if is_adapted(w, adapt) else 1.0
    t = state["t"] = state.get("t", 0) + 1
    m = betas[0] * state.get("m", torch.zeros_like(w)) + (1 - betas[0]) * g
    v = betas[1] * state.get("v", torch.zeros_like(w)) + (1 - betas[1]) * g.square()
    m, v = kept(state, m=m, v=v)
    u = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w - lr * ratio * (u + weight_decay * w), ratio


def excess(g: Tensor, v: Tensor, eps: float, update_clip: float | None) -> float:
    """By how much the update of a whole layer is too large; `g` is what `v`, free of bias, averages the squares of."""
    if update_clip is None:
        return 1.0
    rms = math.sqrt((g.square() / v.clamp(min=eps**2)).mean().item())
    return max(1.0, rms / update_clip)


def stableadamw(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    update_clip: float | None = 1.0,
    decay_form: str = "clipped",
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    """With moments that are divided by 1-βᵗ; debiased averages, as in other codes, are in test_stableadamw.py."""
    t = state["t"] = state.get("t", 0) + 1
    m = betas[0] * state.get("m", torch.zeros_like(w)) + (1 - betas[0]) * g
    v = betas[1] * state.get("v", torch.zeros_like(w)) + (1 - betas[1]) * g.square()
    m, v = kept(state, m=m, v=v)
    m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    rate = lr / excess(g, v, eps, update_clip)
    decay = weight_decay * {"clipped": rate, "unclipped": lr, "fixed": 1.0}[decay_form]
    return w - rate * m / (v.sqrt() + eps) - decay * w, rate / lr
