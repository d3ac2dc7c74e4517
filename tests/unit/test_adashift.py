from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from trustratio.optimizers import AdaShift

from ..reference import adashift
from .canonical_case import parameter

GRADIENTS = ((1.0, -2.0), (0.5, 1.0), (-1.0, 0.5), (2.0, 1.0))
WORKED = {
    "max": ((1.0001447, 0.99963158), (0.99977852, 0.99914884)),
    None: ((1.0002895, 0.99963158), (0.99955705, 0.99914884)),
}


def step(optimizer: Any, w: torch.nn.Parameter, g: Any) -> None:
    w.grad = torch.tensor(g, dtype=w.dtype)
    optimizer.step()


@pytest.mark.parametrize("reduction", list(WORKED))
def test_worked_example(reduction: str | None) -> None:
    w = parameter(1.0, 1.0)
    optimizer = AdaShift([w], keep=2, reduction=reduction)
    weights = []
    for g in GRADIENTS:
        step(optimizer, w, g)
        weights.append(w.tolist())
    assert weights[:2] == [[1.0, 1.0]] * 2
    assert weights[2] == pytest.approx(WORKED[reduction][0], abs=5e-8)
    assert weights[3] == pytest.approx(WORKED[reduction][1], abs=5e-9)
    moment = optimizer.state[w]["exp_avg_sq"] / (1 - 0.999**2)
    assert moment.tolist() == pytest.approx({"max": 2.49925, None: [0.624812, 2.49925]}[reduction], abs=5e-6)


@pytest.mark.parametrize("reduction", list(WORKED))
def test_reference_agrees_with_the_worked_example(reduction: str | None) -> None:
    w, state, weights = torch.ones(2, dtype=torch.float64), {}, []
    for g in GRADIENTS:
        w, _ = adashift(w, torch.tensor(g, dtype=torch.float64), state, lr=1e-3, keep=2, reduction=reduction)
        weights.append(w.tolist())
    assert weights[3] == pytest.approx(WORKED[reduction][1], abs=5e-9)


def test_the_window_is_exact_and_not_a_running_mean() -> None:
    """A huge gradient leaves no trace once it has left the window, but for the second moment."""
    w = parameter(0.0)
    optimizer = AdaShift([w], keep=2, betas=(0.9, 0.0), lr=1.0)
    for g in (1e6, 1.0, 1.0):
        step(optimizer, w, [g])
    before = w.item()
    step(optimizer, w, [1.0])  # of 1.0 and 1.0, over a second moment of 1.0
    assert before - w.item() == pytest.approx(1.0, rel=1e-9)


def test_the_queue_moves_and_nothing_else_until_it_is_full() -> None:
    w = parameter(3.0, 4.0)
    optimizer = AdaShift([w], keep=3, weight_decay=0.5, adapt=True)
    for t in range(1, 4):
        step(optimizer, w, [float(t), -1.0])
        assert w.tolist() == [3.0, 4.0]
        state = optimizer.state[w]
        assert [state[f"past_gradient_{age}"][0].item() for age in range(3)] == [
            float(max(t - age, 0)) for age in range(3)
        ]
        assert state["exp_avg_sq"] == 0
        assert optimizer.trust_ratios() == {"0.0": 1.0}
    step(optimizer, w, [1.0, 1.0])
    assert w.tolist() != [3.0, 4.0]


def test_each_layer_has_its_own_queue() -> None:
    late, early = parameter(1.0), parameter(1.0)
    optimizer = AdaShift([late, early], keep=2)
    for _ in range(3):
        early.grad = torch.ones_like(early)
        optimizer.step()
    late.grad = torch.ones_like(late)
    optimizer.step()
    assert (late.item(), optimizer.state[late]["step"]) == (1.0, 1)
    assert early.item() < 1.0
    early.grad = None
    for _ in range(2):
        step(optimizer, late, [1.0])
    assert late.item() < 1.0
    assert (optimizer.state[early]["step"], optimizer.state[early]["past_gradient_0"]) == (4, 1.0)


@pytest.mark.parametrize("reduction", ["max", "mean", None])
def test_a_gradient_that_was_zero_takes_no_step(reduction: str | None) -> None:
    """No element of the old gradient is 0/0; where each element has its own moment, it is the element that waits."""
    w = parameter(1.0, 1.0)
    optimizer = AdaShift([w], keep=1, reduction=reduction, eps=0.0)
    for g in ((0.0, 1.0), (1.0, 1.0)):
        step(optimizer, w, g)
    assert (w[0].item() == 1.0) == (reduction is None)
    assert w.isfinite().all()
    assert w[1].item() < 1.0


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("implementation", ["eager", "cpu"])
def test_nan_stays_nan(reduction: str, implementation: str) -> None:
    """A maximum that loses NaN would hide the broken element of an old gradient behind the others."""
    w = parameter(*([1.0] * 5), dtype=torch.float32)
    optimizer = AdaShift([w], keep=1, reduction=reduction, implementation=implementation)
    step(optimizer, w, [1.0, math.nan, 3.0, 2.0, 5.0])
    assert w.tolist() == [1.0] * 5
    step(optimizer, w, [1.0] * 5)
    assert w.isnan().all()
    assert optimizer.state[w]["exp_avg_sq"].isnan()


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2)])
@pytest.mark.parametrize("reduction", ["max", "mean", None])
def test_shapes_of_the_state(shape: tuple[int, ...], reduction: str | None) -> None:
    w = torch.nn.Parameter(torch.ones(shape))
    optimizer = AdaShift([w], keep=2, reduction=reduction)
    for _ in range(3):
        step(optimizer, w, torch.ones(shape).tolist())
    state = optimizer.state[w]
    assert state["exp_avg_sq"].shape == (shape if reduction is None else ())
    assert set(state) == {"step", "exp_avg_sq", "past_gradient_0", "past_gradient_1"}
    other = AdaShift([w], keep=7, reduction="max")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # its options come with it
    step(other, w, torch.ones(shape).tolist())
    assert set(other.state[w]) == set(state)


def test_a_layer_of_many_chunks_has_one_maximum() -> None:
    """The largest square is in the second of three chunks."""
    n = 300_001
    w = torch.nn.Parameter(torch.ones(n))
    optimizer = AdaShift([w], keep=1, lr=1.0)
    w.grad = torch.ones(n)
    w.grad[150_000] = -4.0
    optimizer.step()
    w.grad = torch.ones(n)
    optimizer.step()
    assert w[0].item() == w[-1].item() == 1 - 1 / 4


def test_segments_have_a_maximum_each() -> None:
    fused = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = AdaShift([fused], keep=1, lr=1.0, segments=2)
    for _ in range(2):
        fused.grad = torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, 4.0], [1.0, 1.0]])
        optimizer.step()
    assert fused[:, 0].tolist() == [0.5, 0.5, 0.75, 0.75]
    assert optimizer.state[fused]["layers"]["exp_avg_sq"].shape == (2,)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"keep": 2}, {"keep": 3}, "keep must be the same in every group, got 2 in one and 3 in another"),
        ({"reduction": "max"}, {"reduction": None}, "reduction must be None in every group or in none, got 'max'"),
    ],
)
def test_groups_that_would_keep_different_state(first: Any, second: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaShift([{"params": [parameter(1.0)], **first}, {"params": [parameter(1.0)], **second}])


def test_groups_may_reduce_differently() -> None:
    largest, mean = parameter(1.0, 1.0), parameter(1.0, 1.0)
    groups = [{"params": [largest]}, {"params": [mean], "reduction": "mean"}]
    optimizer = AdaShift(groups, keep=1, lr=1.0)
    for _ in range(2):
        for w in (largest, mean):
            w.grad = torch.tensor([1.0, 3.0], dtype=torch.float64)
        optimizer.step()
    assert largest.tolist() == pytest.approx((1 - 1 / 3, 0.0), abs=1e-9)
    assert mean.tolist() == pytest.approx((1 - 1 / 5**0.5, 1 - 3 / 5**0.5))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"keep": 2}, {"keep": 3}, "keep=3 cannot go on from a state of 2 gradients"),
        ({"keep": 3}, {"keep": 2}, "keep=2 cannot go on from a state of 3 gradients"),
        ({"reduction": "max"}, {"reduction": None}, "reduction=None cannot go on from a second moment per layer"),
        ({"reduction": None}, {"reduction": "max"}, "reduction='max' cannot go on from a second moment per element"),
    ],
)
def test_what_is_kept_cannot_change_once_there_is_something(before: Any, after: Any, message: str) -> None:
    w = parameter(1.0, 2.0)
    optimizer = AdaShift([w], **{"keep": 2, **before})
    step(optimizer, w, [1.0, 1.0])
    optimizer.param_groups[0].update(after)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.state.clear()
    step(optimizer, w, [1.0, 1.0])
    assert set(optimizer.state[w]) == {"step", *optimizer.element_state, "exp_avg_sq"}


def test_weights_of_16_bits_are_not_said_to_be_lost_while_the_queue_fills(recwarn: pytest.WarningsRecorder) -> None:
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdaShift([w], keep=2, lr=0.1)
    for _ in range(3):
        step(optimizer, w, [1.0] * 4)
    assert not recwarn.list
    assert (w < 1).all()
