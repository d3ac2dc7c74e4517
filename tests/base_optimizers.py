"""Optimizers to put a trust ratio around, and float64 references of that, written plainly and sharing nothing.

Lion, Sophia and AdaBelief are here in the few lines that make them what they are, so that no test needs a package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from trustratio.optimizers import LayerwiseOptimizer, TrustRatio, create_optimizer

from .reference import REFERENCES
from .references.common import Tensor, is_adapted


class _Base(torch.optim.Optimizer):
    """One layer at a time."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.change(p, p.grad, self.state[p], group)

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define change(): what happens to one layer")


class Lion(_Base):
    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
        if not 0.0 <= betas[0] < 1.0:
            raise ValueError(f"Invalid beta parameter: {betas[0]}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        m = state.setdefault("exp_avg", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (beta1 * m + (1 - beta1) * g).sign())
        m.mul_(beta2).add_(g, alpha=1 - beta2)


class SophiaLike(_Base):
    """A clipped ratio of momentum and curvature, here g² in the curvature's place; counts steps in the group.

    The 1 beside the curvature keeps most elements from being clipped, so that a wrong count shows.
    """

    def __init__(self, params: Any, lr: float = 1e-3, rho: float = 0.04, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "rho": rho, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        super().step()

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = state.setdefault("exp_avg", torch.zeros_like(p)).mul_(0.9).add_(g, alpha=0.1)
        h = state.setdefault("hessian", torch.zeros_like(p)).mul_(0.99).addcmul_(g, g, value=0.01)
        corrected = m / (1 - 0.9 ** group["step"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (corrected / (group["rho"] * h + 1)).clamp(-1, 1))


class AdaBelief(_Base):
    def __init__(self, params: Any, lr: float = 1e-3, eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        t = state["step"] = state.get("step", 0) + 1
        m = state.setdefault("exp_avg", torch.zeros_like(p)).mul_(0.9).add_(g, alpha=0.1)
        s = state.setdefault("exp_avg_var", torch.zeros_like(p)).mul_(0.999)
        s.addcmul_(g - m, g - m, value=0.001)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + group["eps"]))


class NaiveTrustRatio(torch.optim.Optimizer):
    """AdamW scaled by the norms of whatever tensors it is stepped with. The harness must catch it."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                base = state.setdefault("base", torch.optim.AdamW([p], eps=1e-6))
                base.param_groups[0].update(lr=group["lr"], weight_decay=group["weight_decay"])
                before = p.clone()
                base.step()
                u = (before - p) / group["lr"]
                p.copy_(before - group["lr"] * before.norm() / u.norm() * u)


# References ---------------------------------------------------------------------------------------------------------


def adamw(w: Tensor, g: Tensor, state: dict[str, Any], *, eps: float = 1e-6, weight_decay: float = 0.0) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    return (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps) + weight_decay * w


def sgd(w: Tensor, g: Tensor, state: dict[str, Any], *, weight_decay: float = 0.0) -> Tensor:
    d = g + weight_decay * w
    v = state["v"] = d if "v" not in state else 0.9 * state["v"] + d
    return d + 0.9 * v


def rmsprop(w: Tensor, g: Tensor, state: dict[str, Any], *, weight_decay: float = 0.0) -> Tensor:
    d = g + weight_decay * w
    v = state["v"] = 0.99 * state.get("v", 0) + 0.01 * d * d
    return d / (v.sqrt() + 1e-8)


def adagrad(w: Tensor, g: Tensor, state: dict[str, Any], *, weight_decay: float = 0.0) -> Tensor:
    d = g + weight_decay * w
    v = state["v"] = state.get("v", 0) + d * d
    return d / (v.sqrt() + 1e-10)


def lion(w: Tensor, g: Tensor, state: dict[str, Any], *, weight_decay: float = 0.0) -> Tensor:
    m = state.get("m", torch.zeros_like(w))
    state["m"] = 0.99 * m + 0.01 * g
    return (0.9 * m + 0.1 * g).sign() + weight_decay * w


def sophia(w: Tensor, g: Tensor, state: dict[str, Any], *, weight_decay: float = 0.0) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    h = state["h"] = 0.99 * state.get("h", 0) + 0.01 * g * g
    return ((m / (1 - 0.9**t)) / (0.04 * h + 1)).clamp(-1, 1) + weight_decay * w


def adabelief(w: Tensor, g: Tensor, state: dict[str, Any], *, weight_decay: float = 0.0) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    s = state["s"] = 0.999 * state.get("s", 0) + 0.001 * (g - m) ** 2
    return (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8) + weight_decay * w


def scaled(
    direction: Callable[..., Tensor],
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    adapt: bool | None = None,
    trust_bounds: tuple[float, float] = (0.0, math.inf),
    weight_decay: float = 0.0,
) -> tuple[Tensor, float]:
    """W - lr · ratio · u with ratio = ‖w‖ / ‖u‖ within the bounds, of a whole layer."""
    u = direction(w, g, state, weight_decay=weight_decay)
    ratio = 1.0
    if is_adapted(w, adapt):
        w_norm, u_norm = w.norm().item(), u.norm().item()
        ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
        ratio = min(max(ratio, trust_bounds[0]), trust_bounds[1])
    return w - lr * ratio * u, ratio


BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Callable[..., Tensor]]] = {
    "trust_ratio:adamw": (torch.optim.AdamW, {"eps": 1e-6}, adamw),
    "trust_ratio:sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, sgd),
    "trust_ratio:rmsprop": (torch.optim.RMSprop, {}, rmsprop),
    "trust_ratio:adagrad": (torch.optim.Adagrad, {}, adagrad),
    "trust_ratio:lion": (Lion, {}, lion),
    "trust_ratio:sophia": (SophiaLike, {}, sophia),
    "trust_ratio:adabelief": (AdaBelief, {}, adabelief),
}
"""Names of optimizers for tests: the base, its options, and its direction in float64."""

REFERENCES.update({name: partial(scaled, direction) for name, (_, _, direction) in BASES.items()})


def create(name: str, params: Any, **options: Any) -> LayerwiseOptimizer:
    """An optimizer by its registered name, or by one of `BASES`."""
    if name not in BASES:
        return create_optimizer(name, params, **options)
    base, of_base, _ = BASES[name]
    return TrustRatio(base, params, **{**of_base, **options})
