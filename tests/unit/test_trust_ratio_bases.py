"""TrustRatio around unusual bases: they put other data in place, count in groups, move weights and evaluate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from trustratio.optimizers import TrustRatio
from trustratio.optimizers.proposals.nature import nature_of

from .test_proposals import DecaysByItself
from .test_trust_ratio import gradients, parameters, train, values


class Replacing(torch.optim.SGD):
    """Gives its parameters new data, as older classes do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad


@pytest.mark.parametrize("adapt", [None, False])
def test_a_base_that_puts_other_data_in_place(adapt: bool | None) -> None:
    named, wanted = parameters(), parameters()
    addresses = [p.data_ptr() for _, p in named]
    train(TrustRatio(Replacing, named, lr=0.1, adapt=adapt), named)
    train(TrustRatio(torch.optim.SGD, wanted, lr=0.1, adapt=adapt), wanted)
    assert [p.data_ptr() for _, p in named] == addresses
    for name, value in values(wanted).items():
        torch.testing.assert_close(values(named)[name], value)


@pytest.mark.parametrize("base", [torch.optim.Rprop, DecaysByItself])
@pytest.mark.parametrize("zero", [0, torch.tensor(0.0)])
def test_a_rate_of_0_moves_nothing_whatever_the_base_makes_of_it(base: Any, zero: Any) -> None:
    named = parameters()
    optimizer = TrustRatio(base, named, lr=0.1)
    train(optimizer, named)
    before = copy.deepcopy(values(named))
    optimizer.param_groups[0]["lr"] = zero
    train(optimizer, named, range(5, 7))
    for name, value in before.items():
        assert torch.equal(values(named)[name], value)


def test_who_puts_other_data_in_place_is_found_out() -> None:
    cpu = torch.device("cpu")
    assert nature_of(Replacing, {}, cpu).puts_others_in_place
    assert not nature_of(torch.optim.SGD, {}, cpu).puts_others_in_place


class CountsInGroup(torch.optim.Optimizer):
    """Adam with the count of steps in its groups, those without parameters too."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            t = group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad, alpha=0.1)
                v = self.state[p].setdefault("v", torch.zeros_like(p)).mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                p.sub_(group["lr"] * m / (1 - 0.9**t) / ((v / (1 - 0.99**t)).sqrt() + 1e-6))


class CountsInState(CountsInGroup):
    """The same with a count of the whole model."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["step"] = t = self.state.get("step", 0) + 1
        for group in self.param_groups:
            group["step"] = t - 1
        super().step()


@pytest.mark.parametrize("base", [CountsInGroup, CountsInState])
def test_steps_are_counted_once_whatever_the_calls(base: Any) -> None:
    """As under ZeRO-3, which steps one sub-group after the other and leaves the other groups empty."""
    named, wanted = parameters(), parameters()
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    optimizer = TrustRatio(base, groups, lr=0.1)
    whole = TrustRatio(base, [{"params": wanted[:2]}, {"params": wanted[2:]}], lr=0.1)
    for step in range(4):
        train(whole, wanted, range(step, step + 1))
        for (_, p), g in zip(named, gradients(step, named).values(), strict=True):
            p.grad = g.clone()
        for number, (_, p) in enumerate(named):
            for index, group in enumerate(optimizer.param_groups):
                group["params"] = [p] if index == number // 2 else []
            optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [4, 4]
    for name, value in values(wanted).items():
        torch.testing.assert_close(values(named)[name], value)
    assert optimizer.trust_ratios() == pytest.approx(whole.trust_ratios(), rel=1e-6)


class SharpnessAware(torch.optim.SGD):
    """Takes SGD's step with the gradient at weights that it has moved uphill."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(0.1 * p.grad)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old - self.param_groups[0]["lr"] * p.grad)


def test_a_base_that_moves_the_weights_and_evaluates_gets_the_gradient_there() -> None:
    named = parameters()
    optimizer = TrustRatio(SharpnessAware, named, lr=0.1, adapt=False)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for _, p in named) / 2
        loss.backward()
        return loss

    before = copy.deepcopy(values(named))
    optimizer.step(closure)
    for name, value in before.items():  # of ‖w‖²/2 the gradient is w, and 1.1 w after the move
        torch.testing.assert_close(values(named)[name], value - 0.1 * 1.1 * value)
