"""Layers, gradients and the float64 references that steps on a device are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer, create_optimizer

from ..reference import REFERENCES
from ..swept import SWEPT
from ..unit.test_generic import LR, OWN_OPTIONS, backward, make_gradients, make_parameters

__all__ = ["BF16", "LR", "PLAIN", "SHAPES", "Steps", "assert_same", "captured", "make", "without_waiting"]

Tensor = torch.Tensor

BF16 = torch.bfloat16
SHAPES: dict[str, tuple[int, ...]] = {
    "blocks": (1367, 3),
    "odd": (3, 11),
    "bias": (17,),
    "scalar": (),
    "wide": (2, 2048),
}
"""Of two blocks and a little, less than one, without ratio, one element, and of whole blocks."""

PLAIN = [name for name in SWEPT if OPTIMIZERS[name].group_statistics is None]
CANCELS = {"cowclip": {"weight_decay": 0.03}}
"""Adam divides g + λw by its size. With λ = 0.1 the two cancel in some element, whose sign is that of the rounding."""

INTERPRETED = not torch.cuda.is_available()


class Steps:
    """An optimizer on a device, and its reference in float64 on the CPU, which starts each step from the same weights.

    Args:
        name: Of the optimizer.
        device: Of its parameters.
        dtype: Of weights and gradients.
        shapes: Of the layers, by name.
        options: Of the optimizer; `lr` and `weight_decay` are given if they are not here.
    """

    def __init__(
        self,
        name: str,
        device: str,
        dtype: torch.dtype = torch.float32,
        shapes: dict[str, tuple[int, ...]] | None = None,
        **options: Any,
    ):
        self.name, self.dtype = name, dtype
        made = make_parameters(dtype, SHAPES if shapes is None else shapes)
        self.parameters = {layer: torch.nn.Parameter(p.detach().to(device)) for layer, p in made.items()}
        self.options = {"lr": LR, "weight_decay": 0.1, **OWN_OPTIONS.get(name, {}), **CANCELS.get(name, {}), **options}
        implementation = "triton" if name in SWEPT else "eager"
        self.optimizer = create_optimizer(
            name, list(self.parameters.items()), implementation=implementation, **self.options
        )
        self.states: dict[str, dict[str, Any]] = {layer: {} for layer in self.parameters}

    def gradients(self, step: int, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Of all groups of samples, fp64; zero in a whole block of one layer."""
        found = make_gradients(step, self.parameters)
        if "wide" in found:
            found["wide"][:, 1] = 0.0
        return {layer: g for layer, g in found.items() if layer not in without}

    def backward(self, gradients: dict[str, Tensor]) -> None:
        """Leave `grad` at new addresses."""
        self.optimizer.zero_grad()
        if OPTIMIZERS[self.name].group_statistics is None:
            for layer, g in gradients.items():
                self.parameters[layer].grad = g.mean(dim=0).to(self.parameters[layer])
        else:
            device = next(iter(self.parameters.values())).device
            backward(self.parameters, {layer: g.to(device) for layer, g in gradients.items()})

    def step(self, step: int, without: tuple[str, ...] = ()) -> None:
        """Take a step with these layers left out, and compare weights and ratios with the reference's."""
        gradients = self.gradients(step, without)
        before = {layer: p.detach().cpu().double() for layer, p in self.parameters.items()}
        self.backward(gradients)
        self.optimizer.step()
        self.compare(before, gradients)

    def compare(self, before: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        expected, ratios = self._reference(before, gradients)
        for layer, p in self.parameters.items():
            assert_close(p.detach().cpu(), expected[layer], before[layer], layer)
        found = self.optimizer.trust_ratios()
        tolerance = 1e-5 if self.name in ("mclr", "cblr") else 2e-6  # their medians are fp32 numbers
        for layer, ratio in ratios.items():
            assert math.isclose(found[layer], ratio, rel_tol=tolerance), f"{layer}: {found[layer]} for {ratio}"

    def _reference(
        self, before: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        means = {layer: mean for layer, g in gradients.items() if (mean := g.mean(dim=0)).any()}
        norm = math.sqrt(sum(g.square().sum().item() for g in means.values()))
        expected, ratios = dict(before), {}
        for layer, g in means.items():
            state = self.states[layer]
            resolution = torch.finfo(self.dtype).eps
            state.update(model_gradient_norm=norm, group_gradients=gradients[layer], resolution=resolution)
            expected[layer], ratios[layer] = REFERENCES[self.name](before[layer], g, state, **self.options_of(layer))
        return expected, ratios

    def options_of(self, layer: str) -> dict[str, Any]:
        """A layer's, for the reference."""
        return self.options


def assert_close(found: Tensor, expected: Tensor, before: Tensor, layer: str = "") -> None:
    """Each weight is the expected one rounded to its dtype, but for 2e-6 of the largest change.

    The interpreter cuts off bits of bf16 where a device rounds.
    """
    eps = torch.finfo(found.dtype).eps * (1.01 if INTERPRETED else 0.51)
    bound = eps * expected.abs() + 2e-6 * (expected - before).abs().max() + torch.finfo(found.dtype).smallest_normal
    error = (found.double() - expected).abs()
    assert (error <= bound).all(), f"{layer}: off by {(error / bound).max().item():.3g} times what is allowed"


def make(
    name: str, device: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[torch.nn.Parameter], LayerwiseOptimizer]:
    """Parameters with gradients, and an optimizer of them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES.values()]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
    return parameters, create_optimizer(name, parameters, **{"lr": LR, **options})


def assert_same(found: list[torch.nn.Parameter], expected: list[torch.nn.Parameter], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        wanted = b.detach().cpu().double()
        assert (a.detach().cpu().double() - wanted).norm() <= tolerance * wanted.norm()


class without_waiting:
    """A context in which whatever waits for the device raises an error."""

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *raised: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


def captured(optimizer: LayerwiseOptimizer, steps_before: int = 2) -> torch.cuda.CUDAGraph:
    """A graph of one more step, after some that make state and tables."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps_before):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph
