"""Float64, single-process, one-layer-at-a-time references, written plainly from the papers' equations.

Each takes a layer's weights `w`, its gradient `g`, the layer's own `state` dict (empty at first) and options, and
returns (new w, trust ratio). They share nothing with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .reference_belief import adabelief, adashift, fastadabelief

Tensor = torch.Tensor


def is_adapted(w: Tensor, adapt: bool | None) -> bool:
    return w.dim() >= 2 if adapt is None else adapt


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
    v = momentum * v + increment
    state["v"] = v
    update = momentum * v + increment if nesterov else v
    return w - outside * update, q


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
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = beta1 * state.get("m", torch.zeros_like(w)) + ((1 - beta1) if grad_averaging else 1.0) * g
    v = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g * g
    state["m"], state["v"] = m, v
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
    u = (m / c1) / ((v / c2).sqrt() + eps) + weight_decay * w
    w_norm, u_norm = w.norm().item(), u.norm().item()
    ratio = 1.0
    if is_adapted(w, adapt):
        ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
        ratio = min(max(ratio, trust_bounds[0]), trust_bounds[1])
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
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    if normalize_grad:
        g = g / g.norm()
    m = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
    v = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g * g
    state["m"], state["v"] = m, v
    d = (v / (1 - beta2**t)).sqrt() + eps
    u_m = m / (1 - beta1**t) / d + weight_decay * w
    u_g = g / d + weight_decay * w
    ratio_m = ratio_g = 1.0
    if is_adapted(w, adapt) and w.norm() > 0:
        ratio_m = (w.norm() / u_m.norm()).item() if u_m.norm() > 0 else 1.0
        ratio_g = (w.norm() / u_g.norm()).item() if u_g.norm() > 0 else 1.0
    return w - lr * (beta1 * ratio_m * u_m + (1 - beta1) * ratio_g * u_g), ratio_m


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
    state["v"], state["m"] = v, m
    return w - lr * m, 1.0


def sngm(
    w: Tensor, g: Tensor, state: dict[str, Any], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> tuple[Tensor, float]:
    u = momentum * state.get("u", torch.zeros_like(w)) + (g + weight_decay * w) / state["model_gradient_norm"]
    state["u"] = u
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
    state["v"] = v
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
    state["v"] = v
    return w - v, q


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
    state["m"], state["v"] = m, v
    return w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps), 1.0


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
    state["v"] = v
    return w - v, q


def signal_to_noise_ratio(state: dict[str, Any], g: Tensor, gsnr_floor: float) -> Tensor:
    """The VRGD multipliers; `state["resolution"]` is the epsilon of the dtype in which gradients are added up."""
    squares = torch.stack([g_i * g_i for g_i in state["group_gradients"]]).mean(dim=0)
    variance = (squares - g * g).clamp(min=0)
    r = g * g / (variance + state["resolution"] * g * g + 1e-30)
    return (r / r.mean()).clamp(gsnr_floor, 1.0)


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
    v = state["v"] = momentum * state.get("v", torch.zeros_like(w)) + d
    return w - lr * v, 1.0


def vrlars(
    w: Tensor, g: Tensor, state: dict[str, Any], *, gsnr_floor: float = 0.1, **options: Any
) -> tuple[Tensor, float]:
    return lars(w, signal_to_noise_ratio(state, g, gsnr_floor) * g, state, **options)


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
    adapt: bool | None = None,
) -> tuple[Tensor, float]:
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    r = signal_to_noise_ratio(state, g, gsnr_floor)
    p = state["p"] = gsnr_beta * state.get("p", torch.zeros_like(w)) + (1 - gsnr_beta) * r
    h = p / (1 - gsnr_beta**t) * g
    for_v = h if second_moment == "adapted" else g
    m = beta1 * state.get("m", torch.zeros_like(w)) + ((1 - beta1) if grad_averaging else 1.0) * h
    v = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * for_v * for_v
    state["m"], state["v"] = m, v
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
    u = (m / c1) / ((v / c2).sqrt() + eps) + weight_decay * w
    ratio = 1.0
    if is_adapted(w, adapt):
        ratio = (w.norm() / u.norm()).item() if w.norm() > 0 and u.norm() > 0 else 1.0
        ratio = min(max(ratio, trust_bounds[0]), trust_bounds[1])
    return w - lr * ratio * u, ratio


def vradam(
    w: Tensor, g: Tensor, state: dict[str, Any], *, eps: float = 1e-8, weight_decay: float = 0.0, **options: Any
) -> tuple[Tensor, float]:
    return vrlamb(w, g, state, eps=eps, weight_decay=weight_decay, adapt=False, **options)


REFERENCES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "lars": lars,
    "lamb": lamb,
    "lambc": lambc,
    "lans": lans,
    "novograd": novograd,
    "sngm": sngm,
    "tvlars": tvlars,
    "mclr": mclr,
    "cowclip": cowclip,
    "clars": clars,
    "vrsgd": vrsgd,
    "vrlars": vrlars,
    "vradam": vradam,
    "vrlamb": vrlamb,
    "adabelief": adabelief,
    "fastadabelief": fastadabelief,
    "adashift": adashift,
}


def run_reference(
    name: str,
    weights: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    options: dict[str, dict[str, Any]],
    max_norm: float | None = None,
    resolution: float = 2.0**-23,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train every layer for len(gradients) steps.

    Args:
        name: Key of `REFERENCES`.
        weights: Initial weights by layer name.
        gradients: Per step and layer, the gradients of all groups of samples, shape (groups, *layer); the step takes
            their mean. A layer that is missing or all zero is left untouched.
        options: The optimizer's options by layer name.
        max_norm: Clip the whole model's gradient norm to this first, as DeepSpeed does, 1e-6 included.
        resolution: Epsilon of the dtype in which gradients are added up.

    Returns:
        The final weights by name (fp64) and, per step, the ratios of the layers that were updated.
    """
    weights = {layer: w.double() for layer, w in weights.items()}
    states: dict[str, dict[str, Any]] = {layer: {} for layer in weights}
    ratios: list[dict[str, float]] = []
    for step in gradients:
        groups = {layer: g.double() for layer, g in step.items()}
        g64 = {layer: mean for layer, g in groups.items() if (mean := g.mean(dim=0)).any()}
        norm = math.sqrt(sum(g.square().sum().item() for g in g64.values()))
        if max_norm is not None:
            divisor = max(1.0, (norm + 1e-6) / max_norm)
            groups = {layer: g / divisor for layer, g in groups.items()}
            g64 = {layer: g / divisor for layer, g in g64.items()}
            norm = norm / divisor
        ratios.append({})
        for layer, g in g64.items():
            states[layer].update(model_gradient_norm=norm, group_gradients=groups[layer], resolution=resolution)
            weights[layer], ratios[-1][layer] = REFERENCES[name](weights[layer], g, states[layer], **options[layer])
    return weights, ratios


def relative_error(w: Tensor, expected: Tensor, initial: Tensor, path: float | None = None) -> float:
    """‖w - expected‖ / ‖expected - initial‖: the error of the weight *change*.

    Args:
        w: What was found.
        expected: The reference.
        initial: Weights before training.
        path: Length to divide by instead, e.g. of the way that the weights went.
    """
    change = (expected.double() - initial.double()).norm().item() if path is None else path
    error = (w.double() - expected.double()).norm().item()
    return error if change == 0 else error / change
