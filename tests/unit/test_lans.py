from __future__ import annotations

import pytest
import torch

from trustratio.optimizers import LANS

from ..reference import lans
from .canonical_case import GRADIENTS, WEIGHTS, parameter, two_steps


def test_worked_example() -> None:
    first, second, _ = two_steps(LANS, lr=0.01, weight_decay=0.01, adapt=True)
    assert first == pytest.approx((2.963423633, 4.034090605), abs=5e-10)
    assert second == pytest.approx((2.915725841, 4.023636524), abs=5e-10)


def test_reference_agrees_with_the_worked_example() -> None:
    w, state = torch.tensor(WEIGHTS, dtype=torch.float64), {}
    for g in GRADIENTS:
        w, _ = lans(w, torch.tensor(g, dtype=torch.float64), state, lr=0.01, weight_decay=0.01, adapt=True)
    assert w.tolist() == pytest.approx((2.915725841, 4.023636524), abs=5e-10)


def test_the_gradients_size_does_not_matter_once_normalised() -> None:
    results = []
    for scale in (1.0, 1e-30, 1e30):
        w = parameter(*WEIGHTS, dtype=torch.float32)
        optimizer = LANS([w], adapt=True)
        w.grad = torch.tensor(GRADIENTS[0]) * scale
        optimizer.step()
        results.append(w.tolist())
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-6)


def test_layers_that_are_not_adapted_are_normalised_all_the_same() -> None:
    _, small, _ = two_steps(LANS, lr=0.01)
    w = parameter(*WEIGHTS)
    optimizer = LANS([w], lr=0.01)
    for g in GRADIENTS:
        w.grad = torch.tensor(g, dtype=torch.float64) * 1000
        optimizer.step()
    assert w.tolist() == pytest.approx(small, rel=1e-12)
    assert optimizer.trust_ratios() == {"0.0": 1.0}


def test_groups_may_differ_in_whether_they_normalise() -> None:
    together, alone = (parameter(3.0, 4.0), parameter(1.0, 2.0)), (parameter(3.0, 4.0), parameter(1.0, 2.0))
    one = LANS([{"params": [together[0]]}, {"params": [together[1]], "normalize_grad": False}], adapt=True)
    two = [LANS([alone[0]], adapt=True), LANS([alone[1]], adapt=True, normalize_grad=False)]
    for g in GRADIENTS:
        for w in (*together, *alone):
            w.grad = torch.tensor(g, dtype=torch.float64)
        for optimizer in (one, *two):
            optimizer.step()
    assert [w.tolist() for w in together] == [w.tolist() for w in alone]
