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
        of_model = self.state.setdefault("model", {"step": 0})
        of_model["step"] = t = of_model["step"] + 1
        for group in self.param_groups:
            group["step"] = t - 1
        super().step()


class DecaysWithoutGradient(torch.optim.SGD):
    """Decays first, and looks at gradients then."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * 0.1)
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_has_no_gradient_stays(is_frozen: bool) -> None:
    named = parameters()
    name, unused = named[1]
    unused.requires_grad = not is_frozen
    before = unused.detach().clone()
    optimizer = TrustRatio(DecaysWithoutGradient, named, lr=0.1)
    for step in range(2):
        train_but(named, {name}, step)
        optimizer.step()
    assert torch.equal(unused, before)
    assert unused.grad is None
    assert optimizer.param_groups[0]["params"] == [p for _, p in named]


def train_but(named: Any, left_out: set[str], step: int) -> None:
    """Give gradients to the others."""
    for (name, p), g in zip(named, gradients(step, named).values(), strict=True):
        p.grad = None if name in left_out else g.clone()


@pytest.mark.parametrize("base", [CountsInGroup, CountsInState])
def test_steps_over_other_layers_in_turn_are_steps(base: Any) -> None:
    """As in block-coordinate training; a scheduler runs on meanwhile."""
    named, wanted = parameters(), parameters()
    optimizer, plain = TrustRatio(base, named, lr=0.1, adapt=False), base([p for _, p in wanted], lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, plain)]
    for step in range(6):
        for of in (named, wanted):
            for number, (_, p) in enumerate(of):
                p.requires_grad = number % 2 == step % 2
        frozen = {name for name, p in named if not p.requires_grad}
        for one, of in ((optimizer, named), (plain, wanted)):
            train_but(of, frozen, step)
            if one is plain:
                plain.param_groups[0]["params"] = [p for _, p in wanted if p.grad is not None]
            one.step()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["step"] == 6
    assert optimizer.param_groups[0]["lr"] == pytest.approx(plain.param_groups[0]["lr"])
    for name, value in values(wanted).items():
        torch.testing.assert_close(values(named)[name], value)


@pytest.mark.parametrize("way", ["load", "copy", "add"])
def test_a_step_of_zeros_counts_if_there_were_others(way: str) -> None:
    """Whatever has made the optimizer look at its tensors anew before."""
    named, wanted = parameters(), parameters()
    optimizer, plain = TrustRatio(torch.optim.AdamW, named, lr=0.1), TrustRatio(torch.optim.AdamW, wanted, lr=0.1)
    for step in range(5):
        if step == 2 and way == "load":
            optimizer.load_state_dict(optimizer.state_dict())
        elif step == 2 and way == "copy":
            optimizer = copy.deepcopy(optimizer)
            copied = optimizer.param_groups[0]["params"]
            named = [(name, p) for (name, _), p in zip(named, copied, strict=True)]
        elif step == 2:
            optimizer.add_param_group({"params": [("unused", torch.nn.Parameter(torch.ones(3)))]})
        for one, of in ((optimizer, named), (plain, wanted)):
            train(one, of, [step], scale=0.0 if step == 2 else 1.0)
    for name, value in values(wanted).items():
        assert torch.equal(values(named)[name], value)


def test_an_empty_group_keeps_its_place() -> None:
    class GoesByPlace(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for place, group in enumerate(self.param_groups):
                for p in group["params"]:
                    p.sub_(group["lr"] * (p.grad.sign() if place == 0 else p.grad))

    named = parameters()
    before = values(named)
    optimizer = TrustRatio(GoesByPlace, [{"params": []}, {"params": named}], lr=0.1, adapt=False)
    train(optimizer, named, range(1))
    for name, g in gradients(0, named).items():
        torch.testing.assert_close(values(named)[name], before[name] - 0.1 * g)


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
