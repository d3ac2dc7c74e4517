"""References of AdaBelief, FastAdaBelief and AdaShift: see `tests/reference.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from .common import Tensor, is_adapted
from .rounding import kept


def ratio_of(w: Tensor, u: Tensor, adapt: bool | None) -> float:
    """LAMB's."""
    return (w.norm() / u.norm()).item() if is_adapted(w, adapt) and w.norm() > 0 and u.norm() > 0 else 1.0


def adabelief(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    rectify: bool = True,
    decoupled: bool = True,
    fixed_decay: bool = False,
    amsgrad: bool = False,
    degenerated_to_sgd: bool = True,
    adapt: bool | None = False,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    if not decoupled:
        g = g + weight_decay * w
    m = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
    s = beta2 * state.get("s", torch.zeros_like(w)) + (1 - beta2) * (g - m) ** 2 + eps
    m, s = kept(state, m=m, s=s)
    largest = state["largest"] = torch.maximum(state.get("largest", s), s)
    moves = True
    if rectify:
        n_max = 2 / (1 - beta2) - 1
        n = n_max - 2 * t * beta2**t / (1 - beta2**t)
        if n >= 5:
            r = math.sqrt((1 - beta2**t) * (n - 4) / (n_max - 4) * (n - 2) / n * n_max / (n_max - 2))
            u = r / (1 - beta1**t) * m / (s.sqrt() + eps)
        else:
            moves = degenerated_to_sgd
            u = m / (1 - beta1**t) if moves else torch.zeros_like(m)
    else:
        divisor = (largest if amsgrad else s).sqrt() / math.sqrt(1 - beta2**t) + eps
        u = m / (1 - beta1**t) / divisor
    if decoupled and not fixed_decay:
        u = u + weight_decay * w
    ratio = ratio_of(w, u, adapt) if moves else 1.0
    return w - lr * ratio * u - (weight_decay * w if fixed_decay else 0.0), ratio


def fastadabelief(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    beta1: float = 0.9,
    gamma: float = 0.9,
    delta: float = 1e-2,
    weight_decay: float = 0.0,
    constant_lr: bool = False,
    running_maximum: bool = True,
    decoupled: bool = False,
    adapt: bool | None = False,
) -> tuple[Tensor, float]:
    t = state["t"] = state.get("t", 0) + 1
    beta2 = 1 - gamma / t
    if not decoupled:
        g = g + weight_decay * w
    m = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
    s = beta2 * state.get("s", torch.zeros_like(w)) + (1 - beta2) * (g - m) ** 2
    m, s = kept(state, m=m, s=s)
    largest = state["largest"] = torch.maximum(state.get("largest", s), s)
    u = m / ((largest if running_maximum else s) + delta / t)
    if decoupled:
        u = u + weight_decay * w
    ratio = ratio_of(w, u, adapt)
    return w - (lr if constant_lr else lr / t) * ratio * u, ratio


def adashift(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-10,
    keep: int = 10,
    reduction: str | None = "max",
    weight_decay: float = 0.0,
    adapt: bool | None = False,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    queue = state.setdefault("queue", [])
    newest = g, *reversed(queue[1:])
    queue += kept(state, newest=g)
    if len(queue) <= keep:
        return w, 1.0
    old = queue.pop(0)
    k = state["k"] = state.get("k", 0) + 1
    square = old * old
    if reduction is not None:
        square = torch.full_like(w, {"max": square.max, "mean": square.mean}[reduction]().item())
    (v,) = kept(state, v=beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * square)
    weights = [beta1**i for i in range(keep)]
    m = sum(weight * of_age for weight, of_age in zip(weights, newest, strict=True)) / sum(weights)
    u = torch.where(v == 0, 0.0, m / ((v / (1 - beta2**k)).sqrt() + eps)) + weight_decay * w
    ratio = ratio_of(w, u, adapt)
    return w - lr * ratio * u, ratio
