from __future__ import annotations

import math

import pytest
import torch

from trustratio.optimizers import SNGM

from .canonical_case import parameter, two_steps


def test_worked_example() -> None:
    first, second, _ = two_steps(SNGM, lr=0.1)
    assert first == pytest.approx((2.94, 4.08), abs=5e-10)
    assert second == pytest.approx((2.84127864, 4.062557281), abs=5e-10)


def test_the_norm_is_that_of_all_groups() -> None:
    a, b = parameter(1.0, 1.0), parameter(1.0)
    optimizer = SNGM([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1)
    a.grad, b.grad = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    optimizer.step()
    assert a.tolist() == pytest.approx((1 - 0.1 * 3 / 5, 1.0))
    assert b.tolist() == pytest.approx((1 - 0.2 * 4 / 5,))


def test_decay_is_inside_the_quotient_and_outside_the_norm() -> None:
    w = parameter(3.0, 4.0)
    optimizer = SNGM([w], lr=0.1, weight_decay=0.5)
    w.grad = torch.tensor([0.3, -0.4], dtype=torch.float64)
    optimizer.step()
    assert w.tolist() == pytest.approx((3 - 0.1 * (0.3 + 1.5) / 0.5, 4 - 0.1 * (-0.4 + 2.0) / 0.5))


def test_a_step_is_never_longer_than_its_bound() -> None:
    w = parameter(*torch.zeros(10).tolist())
    optimizer = SNGM([w], lr=0.1, momentum=0.9)
    for step in range(50):
        before = w.detach().clone()
        w.grad = torch.full_like(w, 10.0**step)
        optimizer.step()
        assert (w - before).norm() <= 0.1 / (1 - 0.9) + 1e-12


def test_an_infinite_gradient_breaks_every_layer_that_has_one() -> None:
    a, b = parameter(1.0, 1.0), parameter(1.0)
    optimizer = SNGM([a, b], lr=0.1)
    a.grad, b.grad = torch.tensor([math.inf, 1.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert a.isnan().all()
    assert b.isnan().all()
