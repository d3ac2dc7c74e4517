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
        super().__init__(params, {"lr": lr, "limit": limit})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
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


class ClipsLayers(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g / (g.norm() / limit).clamp(min=1.0))


class WarmsUp(Plain):
    """Looks at norms after 25 steps only."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * g if self.steps < 25 else lr * g / g.norm())


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
