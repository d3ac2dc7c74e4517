"""Float64 reference of CurvatureSGD and CurvatureAdamW with samples, of whole layers, sharing nothing but the signs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trustratio.optimizers.sampling.signs import signs

Tensor = torch.Tensor
Weights = dict[str, Tensor]
Gradient = Callable[[int, Weights], Weights]
"""The mean gradient of a step's batch at any weights."""


class CurvatureReference:
    """Trains with a sample in every `interval`-th step. Options as the optimizers' own, by layer."""

    def __init__(
        self, kind: str, weights: Weights, options: dict[str, dict[str, Any]], *, interval: int, seed: int = 0
    ):
        self.kind, self.options, self.interval, self.seed = kind, options, interval, seed
        self.weights = {name: w.double() for name, w in weights.items()}
        self.state: dict[str, dict[str, Any]] = {
            name: {"descent": 0.0, "curvature": 0.0, "samples": 0} for name in weights
        }
        self.count = 0
        self.estimates: list[dict[str, tuple[float, float]]] = []

    def direction(self, name: str, g: Tensor, keep: bool) -> Tensor:
        """The step at rate 1, without decoupled decay."""
        options, state = self.options[name], self.state[name]
        if self.kind == "curvature_sgd":
            d = g + options.get("weight_decay", 0.0) * self.weights[name]
            new = {"v": options.get("momentum", 0.9) * state.get("v", torch.zeros_like(g)) + d}
            p = -new["v"]
        else:
            beta1, beta2 = options.get("betas", (0.9, 0.999))
            t = state.get("t", 0) + 1
            m = beta1 * state.get("m", torch.zeros_like(g)) + (1 - beta1) * g
            v = beta2 * state.get("s", torch.zeros_like(g)) + (1 - beta2) * g * g
            new = {"t": t, "m": m, "s": v}
            p = -(m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + options.get("eps", 1e-8))
        if keep:
            state.update(new)
        return p

    def sample(self, gradient: Gradient, step: int, g: Weights) -> None:
        chosen = signs(self.seed, self.count, [f"{name}/0" for name in self.weights]).tolist()
        p = {name: self.direction(name, g[name], keep=False) for name in g}
        factor = {}
        for sign, name in zip(chosen, self.weights, strict=True):
            if name in g:
                w = self.weights[name]
                reach = max(w.norm().item(), 0.01 * w.numel() ** 0.5)
                factor[name] = sign * self.options[name].get("perturbation", 0.01) * reach / p[name].norm().item()
        moved = {name: w + factor[name] * p[name] if name in g else w for name, w in self.weights.items()}
        there = gradient(step, moved)
        self.estimates.append({})
        for name in g:
            decay = self.options[name].get("weight_decay", 0.0) if self.kind == "curvature_sgd" else 0.0
            descent = -((g[name] + decay * self.weights[name]) * p[name]).sum().item()
            curvature = ((there[name] - g[name]) * p[name]).sum().item() / factor[name]
            curvature += decay * p[name].square().sum().item()
            self.estimates[-1][name] = descent, curvature
            state, beta = self.state[name], self.options[name].get("beta", 0.95)
            state["descent"] = beta * state["descent"] + (1 - beta) * descent
            state["curvature"] = beta * state["curvature"] + (1 - beta) * curvature
            state["samples"] += 1

    def ratio(self, name: str) -> float:
        options, state = self.options[name], self.state[name]
        cap = options.get("cap", 1.0 if self.kind == "curvature_sgd" else 0.1)
        if options.get("adapt", True) is None and self.weights[name].dim() < 2:
            return 1.0
        if not state["samples"]:
            return min(1.0, cap)
        bias = 1 - options.get("beta", 0.95) ** state["samples"]
        curvature = state["curvature"] / bias
        if options.get("negative", "absolute") == "absolute":
            curvature = abs(curvature)
        return min(max(state["descent"], 0.0) / bias / max(curvature, options.get("floor", 1e-12)), cap)

    def train(self, gradient: Gradient, first: int, last: int, clip: float | None = None) -> list[dict[str, float]]:
        """Take steps and return the ratios of each. A limit of the norm clips the step's gradient, not the sample's."""
        ratios = []
        for step in range(first, last):
            g = {name: each for name, each in gradient(step, self.weights).items() if each.any()}
            if self.count % self.interval == 0:
                self.sample(gradient, step, g)
            if clip is not None:
                norm = sum(each.square().sum().item() for each in g.values()) ** 0.5
                g = {name: each / max(1.0, (norm + 1e-6) / clip) for name, each in g.items()}
            ratios.append({name: self.ratio(name) for name in g})
            for name, each in g.items():
                options = self.options[name]
                p = self.direction(name, each, keep=True)
                decay = 0.0 if self.kind == "curvature_sgd" else options.get("weight_decay", 0.01)
                self.weights[name] = self.weights[name] + options["lr"] * ratios[-1][name] * (
                    p - decay * self.weights[name]
                )
            self.count += 1
        return ratios
