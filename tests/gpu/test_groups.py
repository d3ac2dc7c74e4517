"""Fifty parameter groups with rates and decays of their own: stepped together, and captured in one graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.on_gpu.speed.devices import device_of
from trustratio.optimizers import LayerwiseOptimizer, create_optimizer

from .cases import INTERPRETED, LR, Steps, assert_close, assert_same, captured, without_waiting
from .test_graphs import CAPTURED

GROUPS = 12 if INTERPRETED else 50  # the interpreter takes its time for each layer
SHAPES: dict[str, tuple[int, ...]] = {f"layer{i}": (5, 7 + i % 10) if i % 2 else (6 + i,) for i in range(GROUPS)}
SHAPES["layer7"] = (1367, 3)


def options_of_groups(device: str) -> list[dict[str, Any]]:
    """Rates are tensors on the device."""
    return [
        {"lr": torch.tensor(LR * (0.5 + i / GROUPS), device=device), "weight_decay": 0.1 * (i % 3)}
        for i in range(GROUPS)
    ]


class GroupSteps(Steps):
    """Layers with a group each. Gradients stay where they are, so that steps can be captured."""

    def __init__(self, name: str, device: str):
        super().__init__(name, device, shapes=SHAPES)
        self.given = dict(zip(SHAPES, options_of_groups(device), strict=True))
        groups = [{"params": [(layer, p)], **self.given[layer]} for layer, p in self.parameters.items()]
        self.optimizer = create_optimizer(name, groups, implementation="triton", **self.options)

    def options_of(self, layer: str) -> dict[str, Any]:
        of_group = self.given[layer]
        return {**self.options, **of_group, "lr": of_group["lr"].item()}

    def backward(self, gradients: dict[str, torch.Tensor]) -> None:
        for layer, g in gradients.items():
            p = self.parameters[layer]
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(g.mean(dim=0))

    def replay(self, step: int, replay: Callable[[], Any]) -> None:
        """As `step`, by the replay of a step; ratios that the optimizer tells may be those of another one."""
        gradients = self.gradients(step)
        before = {layer: p.detach().cpu().double() for layer, p in self.parameters.items()}
        self.backward(gradients)
        replay()
        expected, _ = self._reference(before, gradients)
        for layer, p in self.parameters.items():
            assert_close(p.detach().cpu(), expected[layer], before[layer], layer)


def replay_of(optimizer: LayerwiseOptimizer) -> Callable[[], Any]:
    """Another step, out of a graph where there are such."""
    return optimizer.step if INTERPRETED else captured(optimizer, steps_before=0).replay


@pytest.mark.parametrize("name", CAPTURED)
def test_equal_to_the_reference_and_captured(name: str, device: str) -> None:
    """A replay reads the rates and gradients that are there; other steps may come between."""
    steps = GroupSteps(name, device)
    for step in range(2):
        steps.step(step)
    replay = replay_of(steps.optimizer)
    for step in range(2, 4):
        for index, options in enumerate(steps.given.values()):
            options["lr"].mul_(0.9 if index % 2 else 0.7)
        steps.replay(step, replay)
    steps.step(4)
    steps.replay(5, replay)
    (plan,) = steps.optimizer._plans.values()
    assert len(plan.group_layers) == 1


def some_groups(name: str, device: str, groups: int, implementation: str = "triton") -> LayerwiseOptimizer:
    """The same layers in so many groups, with gradients."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES.values()]
    for p in layers:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    options = options_of_groups(device)[:groups]
    size = GROUPS // groups
    members = [{"params": layers[size * i : size * (i + 1)], **of_group} for i, of_group in enumerate(options)]
    return create_optimizer(name, members, lr=LR, implementation=implementation)


@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "adabelief"])
def test_launches_do_not_grow_with_groups(name: str, device: str) -> None:
    """A vector of rates takes one launch more than a rate, whatever its length."""
    counts = {}
    for groups in (1, 2, GROUPS):
        optimizer = some_groups(name, device, groups)
        for _ in range(2):
            optimizer.step()
        found = device_of(device).launches(optimizer.step)
        if "missing" in found:
            pytest.skip(found["missing"])
        counts[groups] = found["kernels"] + found.get("copies_and_fills", 0)
    assert counts[GROUPS] - counts[2] <= 2, counts
    assert 0 < counts[2] <= counts[1] + 20, counts


def test_rates_that_are_numbers_are_sent_without_waiting(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New ones at each step, while the device may be several steps behind: none of them is written over."""
    optimizer, reference = some_groups("lamb", device, GROUPS), some_groups("lamb", "cpu", GROUPS, "eager")

    def step(of: LayerwiseOptimizer, number: int) -> None:
        for index, group in enumerate(of.param_groups):
            group["lr"] = 0.02 * (1 + (7 * index + 3 * number) % 11)
        of.step()

    steps = 4 if INTERPRETED else 12
    with monkeypatch.context() as patch:
        patch.setattr(type(reference), "vector_options", ())  # group by group
        for number in range(steps):
            step(reference, number)
    for number in range(2):
        step(optimizer, number)
    with nullcontext() if INTERPRETED else without_waiting():
        if not INTERPRETED:
            torch.cuda._sleep(100_000_000)
        for number in range(2, steps):
            step(optimizer, number)
    layers = [[p for group in of.param_groups for p in group["params"]] for of in (optimizer, reference)]
    assert_same(*layers, tolerance=1e-5)
