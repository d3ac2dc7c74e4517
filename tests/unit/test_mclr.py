from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trustratio.optimizers import MCLR

from ..reference import mclr
from .canonical_case import GRADIENTS, WEIGHTS, parameter, two_steps


def ratio_of(w: torch.Tensor, g: torch.Tensor, **options: float) -> float:
    p = torch.nn.Parameter(w.clone())
    optimizer = MCLR([p], lr=0.0, adapt=True, **options)
    p.grad = g
    optimizer.step()
    return optimizer.trust_ratios()["0.0"]


def test_worked_example() -> None:
    """|w|/|g| = (10, 10), then (29.7, 20.2), whose lower median is 20.2; v₂ = 0.9·(0.03, -0.04) + 0.202·(0.1, 0.2)."""
    first, second, _ = two_steps(MCLR, lr=0.01, eps=0.0, adapt=True)
    assert first == pytest.approx((2.97, 4.04), abs=1e-7)
    assert second == pytest.approx((2.97 - 0.0472, 4.04 - 0.0044), abs=1e-7)


def test_reference_agrees_with_the_worked_example() -> None:
    w, state = torch.tensor(WEIGHTS, dtype=torch.float64), {}
    for g in GRADIENTS:
        w, _ = mclr(w, torch.tensor(g, dtype=torch.float64), state, lr=0.01, eps=0.0, adapt=True)
    assert w.tolist() == pytest.approx((2.9228, 4.0356), abs=1e-12)


sizes = st.floats(0, 2.0**99, width=32) | st.sampled_from([0.0, 1.0, 1e-45, 1e-30])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=40))
def test_the_median_is_that_of_a_sort(pairs: list[tuple[float, float]]) -> None:
    w, g = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    keys = (w / (g + 1e-8))[g != 0]
    expected = keys.median().item() if len(keys) and keys.median() > 0 else 1.0
    if not g.double().square().sum().isfinite():
        expected = math.nan
    assert ratio_of(w, g) == pytest.approx(expected, rel=0, nan_ok=True)


def test_an_even_count_takes_the_lower_median() -> None:
    w, g = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)
    assert ratio_of(w, g, eps=0.0) == 2.0


def test_a_layer_of_many_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 300_001, generator=generator)
    assert ratio_of(w, g) == (w.abs() / (g.abs() + 1e-8)).median().item()


def test_elements_without_gradient_are_left_out() -> None:
    w, g = torch.tensor([1.0, 2.0, 3.0, 50.0, 60.0, 70.0]), torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0, 0.0])
    assert ratio_of(w, g, eps=0.0) == 2.0


def test_weights_that_start_at_zero_take_the_plain_step() -> None:
    w = parameter(0.0, 0.0)
    optimizer = MCLR([w], lr=0.1, adapt=True)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert w.tolist() == pytest.approx((-0.1, -0.1))


def test_nan_is_not_hidden_by_the_order() -> None:
    assert math.isnan(ratio_of(torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 1.0, math.nan])))
