from __future__ import annotations

import pytest
import torch

from trustratio.optimizers import NovoGrad

from .canonical_case import parameter, two_steps


def test_worked_example() -> None:
    first, second, optimizer = two_steps(NovoGrad, lr=0.01, weight_decay=0.001)
    assert first == pytest.approx((2.99397, 4.00796), abs=5e-10)
    assert second == pytest.approx((2.986195366, 4.011449531), abs=5e-10)
    (state,) = optimizer.state.values()
    assert state["exp_avg_sq"].item() == pytest.approx(0.246, rel=1e-15)
    assert state["exp_avg_sq"].dim() == 0


def test_the_first_step_is_told_by_the_step_count_and_not_by_a_zero_moment() -> None:
    """With β₂ = 1/2 a second gradient after one so small that its square is zero in fp32 must count only half."""
    w = parameter(0.0, 0.0, dtype=torch.float32)
    optimizer = NovoGrad([w], lr=1.0, betas=(0.0, 0.5), eps=0.0)
    for g in (1e-30, 2.0):
        w.grad = torch.tensor([g, 0.0])
        optimizer.step()
    assert optimizer.state[w]["exp_avg_sq"].item() == pytest.approx(2.0)


def test_a_layer_starts_when_it_gets_its_first_gradient() -> None:
    w, other = parameter(1.0), parameter(1.0)
    optimizer = NovoGrad([w, other], lr=0.1)
    w.grad, other.grad = torch.zeros_like(w), torch.ones_like(other)
    optimizer.step()
    w.grad = torch.full_like(w, 2.0)
    optimizer.step()
    assert optimizer.state[w]["step"] == 1
    assert optimizer.state[w]["exp_avg_sq"] == 4.0
    assert optimizer.state[other]["step"] == 2


def test_grad_averaging_scales_what_is_added() -> None:
    w = parameter(3.0, 4.0)
    optimizer = NovoGrad([w], lr=1.0, betas=(0.75, 0.5), grad_averaging=True)
    w.grad = torch.tensor([0.3, -0.4], dtype=torch.float64)
    optimizer.step()
    assert w.tolist() == pytest.approx((3 - 0.25 * 0.6, 4 + 0.25 * 0.8), rel=1e-7)
