"""What kind of optimizer a class is, told by trying it, also where it hides what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers.proposals.nature import Nature, nature_of

from ..base_optimizers import BASES


class Plain(torch.optim.Optimizer):
    """SGD; subclasses make it something else."""

    def __init__(self, params: Any, lr: float = 0.1, limit: float = 1.0):
        super().__init__(params, {"lr": lr, "limit": limit, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                self.change(p, p.grad, self.state[p], group["lr"], group["limit"])

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g)

    def norm(self) -> torch.Tensor:
        return torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()


class ClipsTheModel(Plain):
    """Only where the norm of all gradients is above the limit."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g / (self.norm() / limit).clamp(min=1.0))


class EstimatesTheModel(Plain):
    """Sums over all gradients, and does something with that only when it is large."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        group = self.param_groups[0]
        group["estimate"] = group.get("estimate", 0.0) + 1e-9 * float(g.square().sum())
        p.sub_(lr * g * max(1.0, group["estimate"]))


class ClipsLayers(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g / (g.norm() / limit).clamp(min=1.0))


class WarmsUp(Plain):
    """Looks at norms after 25 steps only."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g if self.param_groups[0]["steps"] < 25 else lr * g / g.norm())


class DecaysMatrices(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * (g + 0.01 * p * (p.dim() > 1)))


class PreparesRows(Plain):
    """Keeps rows it has not used so far."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        state["rows"] = g.square().mean(dim=-1)
        p.sub_(lr * g)


class HidesRows(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        state["helper"] = type("Helper", (), {})()
        state["helper"].rows = [g.square().mean(dim=-1)]
        p.sub_(lr * g)


class WantsMatrices(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        if p.dim() != 2:
            raise ValueError("matrices only")
        p.sub_(lr * g)


class Noisy(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * (g + torch.randn_like(g)))


class RateInMomentum(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        v = state.setdefault("v", torch.zeros_like(p)).mul_(0.9).add_(g, alpha=lr)
        p.sub_(v)


class LimitedRate(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(min(lr, limit) * g)


class DecaysByItself(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.mul_(0.999).sub_(lr * g)


class AveragesWeights(Plain):
    """The step does not depend on the rate, but the state does."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g)
        state.setdefault("average", torch.zeros_like(p)).lerp_(p, 0.1)


class ForgetsItsCount(Plain):
    """Keeps in the optimizer object what neither files nor several calls of a step know."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        super().step()

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g / self.count)


class KeepsBuffers(Plain):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.buffers: dict[Any, torch.Tensor] = {}

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * self.buffers.setdefault(p, torch.zeros_like(p)).mul_(0.9).add_(g))


class WrapsAnother(Plain):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.inner = torch.optim.Adam(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class EveryFifth(ForgetsItsCount):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g * (2 if self.count % 5 == 0 else 1))


class KeepsCaches(ForgetsItsCount):
    """Counts as well, but no step depends on it."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g)


class RateAndDecayInMomentum(Plain):
    """State that depends on rate and weights, and is no copy."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(state.setdefault("v", torch.zeros_like(p)).mul_(0.9).add_(g + 0.1 * p, alpha=lr))


class KeepsFirstWeights(Plain):
    """A copy of what the weights were, whatever step they took."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        if "first" not in state:
            state["first"] = p.clone()
        p.sub_(min(lr, limit) * (g + 0.1 * (p - state["first"])))


class LooksAhead(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        slow = state.setdefault("slow", p.clone())
        p.sub_(lr * g)
        if self.param_groups[0]["steps"] % 5 == 0:
            slow.lerp_(p, 0.5)
            p.copy_(slow)


def found(base_class: type[torch.optim.Optimizer], **options: Any) -> Nature:
    return nature_of(base_class, options, torch.device("cpu"))


@pytest.mark.parametrize("name", BASES)
def test_bases_of_the_tests_are_element_wise_and_proportional(name: str) -> None:
    base_class, options, _ = BASES[name]
    assert found(base_class, **options) == Nature(True, True, False, True)


@pytest.mark.parametrize(
    ("base_class", "is_element_wise", "is_layer_wise", "is_proportional"),
    [
        (Plain, True, True, True),
        (ClipsTheModel, False, False, True),
        (EstimatesTheModel, False, False, True),
        (ClipsLayers, False, True, True),
        (WarmsUp, False, True, True),
        (DecaysMatrices, False, True, True),
        (PreparesRows, False, True, True),
        (HidesRows, False, True, True),
        (WantsMatrices, False, True, True),
        (RateInMomentum, True, True, False),
        (LimitedRate, True, True, False),
        (DecaysByItself, True, True, False),
        (AveragesWeights, True, True, False),
        (torch.optim.Muon, False, True, True),
        (torch.optim.Adafactor, False, True, False),
        (torch.optim.ASGD, True, True, False),
        (torch.optim.Rprop, True, True, False),
        (torch.optim.LBFGS, False, False, False),
    ],
)
def test_what_it_does_shows(
    base_class: type[torch.optim.Optimizer], is_element_wise: bool, is_layer_wise: bool, is_proportional: bool
) -> None:
    nature = found(base_class)
    assert (nature.is_element_wise, nature.is_layer_wise) == (is_element_wise, is_layer_wise)
    assert (nature.is_proportional, nature.is_random) == (is_proportional, False)


@pytest.mark.parametrize(
    ("base_class", "hidden"),
    [
        (ForgetsItsCount, ("self.count",)),
        (EveryFifth, ("self.count",)),
        (KeepsBuffers, ("self.buffers",)),
        (WrapsAnother, ("self.inner",)),
        (KeepsCaches, None),
        (Noisy, None),
        (torch.optim.AdamW, None),
    ],
)
def test_what_is_neither_in_state_nor_in_groups_is_found(base_class: Any, hidden: tuple[str, ...] | None) -> None:
    assert found(base_class).hidden == hidden


@pytest.mark.parametrize(
    ("base_class", "follows"),
    [
        (AveragesWeights, True),
        (LooksAhead, True),
        (torch.optim.ASGD, True),
        (RateInMomentum, False),
        (RateAndDecayInMomentum, False),
        (KeepsFirstWeights, False),
        (torch.optim.Rprop, False),
    ],
)
def test_copies_of_weights_are_found(base_class: Any, follows: bool) -> None:
    assert found(base_class).follows_weights is follows


def test_an_option_may_be_infinite() -> None:
    assert nature_of(Plain, {"limit": float("inf")}, torch.device("cpu")).is_element_wise


def test_options_make_a_difference() -> None:
    assert not found(ClipsLayers, limit=0.1).is_element_wise
    assert found(ClipsLayers, limit=1e9).is_element_wise


def test_random_numbers_are_told_and_the_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    nature = found(Noisy)
    assert (nature.is_random, nature.is_element_wise, nature.is_proportional) == (True, False, False)
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(0)))


def test_what_it_raised_is_kept() -> None:
    assert found(WantsMatrices).failure == "ValueError: matrices only"


def test_how_it_is_computed_does_not_matter() -> None:
    """Options that want a GPU are left out in the trial."""
    assert found(torch.optim.AdamW, capturable=True, fused=True).is_element_wise
