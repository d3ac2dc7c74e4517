from __future__ import annotations

import math

import pytest
import torch

from trustratio.optimizers import CBLR, LARS, MCLR, LayerwiseOptimizer

from ..reference import cblr

W, G = (0.5, -1.0, 2.0, 0.1), (0.1, 0.2, -0.1, 0.05)
STATISTICS = {"median": 4.9975, "mean": 7.9887, "norm": 9.16547}
"""Of W and G with a decay of 1e-4: the elements' ratios are 4.9975, 4.9975, 19.9601 and 1.9996."""

statistics = pytest.mark.parametrize("statistic", STATISTICS)


def one_step(w: torch.Tensor, g: torch.Tensor, optimizer_class: type = CBLR, **options: object) -> LayerwiseOptimizer:
    parameter = torch.nn.Parameter(w.clone())
    optimizer = optimizer_class([parameter], **{"lr": 0.01, "adapt": True, **options})
    parameter.grad = g
    optimizer.step()
    return optimizer


def ratio_of(w: torch.Tensor, g: torch.Tensor, **options: object) -> float:
    return one_step(w, g, **options).trust_ratios()["0.0"]


def weights(optimizer: LayerwiseOptimizer) -> torch.Tensor:
    return optimizer.param_groups[0]["params"][0].detach()


@statistics
def test_worked_example(statistic: str) -> None:
    w, g = torch.tensor(W, dtype=torch.float64), torch.tensor(G, dtype=torch.float64)
    found = ratio_of(w, g, weight_decay=1e-4, eps=0.0, statistic=statistic)
    assert found == pytest.approx(STATISTICS[statistic], rel=1e-5)
    _, reference = cblr(w, g, {}, lr=0.01, weight_decay=1e-4, eps=0.0, statistic=statistic, adapt=True)
    assert reference == pytest.approx(STATISTICS[statistic], rel=1e-5)


def made_up(rows: int = 40, columns: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, rows, columns, generator=generator)
    return w, g


def test_the_median_is_mclr() -> None:
    w, g = made_up()
    found, wanted = one_step(w, g, weight_decay=0.1), one_step(w, g, MCLR, weight_decay=0.1)
    assert torch.equal(weights(found), weights(wanted))
    assert found.trust_ratios() == wanted.trust_ratios()


@pytest.mark.parametrize("implementation", ["eager", None])
def test_the_norm_is_lars_with_a_trust_coefficient_of_one(implementation: str | None) -> None:
    w, g = made_up()
    options = {"weight_decay": 0.1, "eps": 1e-3, "implementation": implementation}
    found = one_step(w, g, statistic="norm", **options)
    wanted = one_step(w, g, LARS, trust_coefficient=1.0, **options)
    assert torch.equal(weights(found), weights(wanted))
    assert found.trust_ratios() == wanted.trust_ratios()


def test_mclr_keeps_its_options() -> None:
    """Its saved files have no statistic."""
    assert "statistic" not in one_step(*made_up(), MCLR).state_dict()["param_groups"][0]


def test_ratios_beyond_fp32_are_added_up() -> None:
    """1e30 / 1e-20 has no fp32; the mean of it and of nearly nothing has a fp64."""
    w, g = torch.tensor([1e30, 1.0, 1.0]), torch.tensor([1e-20, 1.0, 1.0])
    assert ratio_of(w, g, eps=0.0, statistic="mean", lr=0.0) == pytest.approx(1e50 / 3, rel=1e-6)


def test_small_ratios_beside_a_large_one_are_not_lost() -> None:
    """In fp32, which has 24 bits, the ones would vanish beside 2²⁴."""
    w = torch.ones(1001)
    g = torch.ones(1001)
    g[0] = 2.0**-24
    assert ratio_of(w, g, eps=0.0, statistic="mean") == pytest.approx((2.0**24 + 1000) / 1001, rel=1e-12)


def test_elements_without_gradient_are_left_out_of_the_mean() -> None:
    w, g = torch.tensor([1.0, 2.0, 3.0, 50.0]), torch.tensor([1.0, 1.0, -1.0, 0.0])
    assert ratio_of(w, g, eps=0.0, statistic="mean") == 2.0


@statistics
def test_the_ratio_is_one_where_weights_are_zero_and_where_nothing_is_adapted(statistic: str) -> None:
    assert ratio_of(torch.zeros(3), torch.ones(3), statistic=statistic) == 1.0
    assert ratio_of(torch.full((3,), 5.0), torch.ones(3), statistic=statistic, adapt=False) == 1.0


@statistics
def test_a_layer_without_gradient_is_left_as_it_is(statistic: str) -> None:
    optimizer = one_step(torch.ones(3), torch.zeros(3), statistic=statistic, weight_decay=0.1)
    assert weights(optimizer).tolist() == [1.0, 1.0, 1.0]
    assert optimizer.trust_ratios() == {"0.0": 1.0}


@pytest.mark.parametrize("statistic", ["median", "mean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_seen(statistic: str, bad: float) -> None:
    """An infinite one has the ratio zero, which a mean and an order hide."""
    assert math.isnan(ratio_of(torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 1.0, bad]), statistic=statistic))


def test_groups_may_have_different_statistics() -> None:
    w, g = made_up()
    parameters = [torch.nn.Parameter(w.clone()) for _ in STATISTICS]
    groups = [{"params": [p], "statistic": s} for p, s in zip(parameters, STATISTICS, strict=True)]
    optimizer = CBLR(groups, lr=0.01)
    for p in parameters:
        p.grad = g
    optimizer.step()
    for p, statistic in zip(parameters, STATISTICS, strict=True):
        assert torch.equal(p.detach(), weights(one_step(w, g, statistic=statistic)))


def test_the_state_goes_on_in_another_optimizer() -> None:
    w, g = made_up()
    first = one_step(w, g, statistic="mean")
    second = one_step(weights(first), torch.zeros_like(g), statistic="norm")
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        optimizer.param_groups[0]["params"][0].grad = g
        optimizer.step()
    assert torch.equal(weights(first), weights(second))
    assert second.param_groups[0]["statistic"] == "mean"
