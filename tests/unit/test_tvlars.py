from __future__ import annotations

import math

import pytest
import torch

from trustratio.optimizers import LARS, TVLARS

from .canonical_case import GRADIENTS, parameter, two_steps


def test_worked_example_of_the_released_form() -> None:
    first, second, _ = two_steps(TVLARS, lr=1.0, decay=0.01, weight_decay=5e-4, form="released", adapt=True)
    assert first == pytest.approx((2.99728013, 4.003590409), abs=5e-10)
    assert second == pytest.approx((2.992827761, 4.002832463), abs=5e-10)


def test_worked_example_of_the_paper_form() -> None:
    """φ₁ = 1/(1 + e^(2(1-3))) + 0.1 = 1.0820137900, ‖w‖/(‖g‖ + 0.1‖w‖) = 5."""
    w = parameter(3.0, 4.0)
    optimizer = TVLARS([w], lr=1.0, weight_decay=0.1, trust_coefficient=0.01, decay=2.0, delay=3, floor=0.1, adapt=True)
    w.grad = torch.tensor(GRADIENTS[0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.trust_ratios()["0.0"] == pytest.approx(0.01 * 1.0820137900 * 5, rel=1e-9)
    assert w.tolist() == pytest.approx((3 - 0.0541006895 * 0.6, 4), rel=1e-9)


def test_without_decay_it_is_lars_with_half_the_coefficient() -> None:
    options = {"lr": 1.0, "weight_decay": 0.1, "adapt": True}
    _, ours, _ = two_steps(TVLARS, decay=0.0, trust_coefficient=0.02, **options)
    _, lars, _ = two_steps(LARS, trust_coefficient=0.01, momentum_form="gradient", **options)
    assert ours == pytest.approx(lars, rel=1e-12)


def test_the_released_form_bounds_both_norms() -> None:
    w = parameter(30.0, 40.0)
    optimizer = TVLARS([w], lr=1.0, trust_coefficient=1.0, decay=0.0, form="released", adapt=True)
    w.grad = torch.tensor([300.0, -400.0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.trust_ratios()["0.0"] == pytest.approx(1 / 1.1)


def test_a_factor_that_has_vanished_stops_the_layer() -> None:
    w = parameter(3.0, 4.0)
    optimizer = TVLARS([w], lr=1.0, decay=1e6, adapt=True)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert w.tolist() == [3.0, 4.0]
    assert optimizer.trust_ratios()["0.0"] == 0.0


def test_the_schedule_counts_the_updates_of_the_layer() -> None:
    model = torch.nn.ParameterList([parameter(3.0, 4.0)])  # of no module, it would pass for one that a module has lost
    (w,) = model
    optimizer = TVLARS([w], lr=0.0, trust_coefficient=1.0, decay=0.5, adapt=True)
    for gradient in (None, [3.0, 4.0], None, [3.0, 4.0]):
        w.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert optimizer.trust_ratios()["0.0"] == pytest.approx(1 / (1 + math.exp(0.5 * 2)))


@pytest.mark.parametrize("option", [{"delay": 10}, {"alpha": 0.5}, {"floor": 0.1}])
def test_the_released_form_refuses_what_its_code_lacks(option: dict[str, float]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be left at its default"):
        TVLARS([parameter(1.0)], lr=1.0, form="released", **option)
