from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trustratio.optimizers import AdaBelief, FastAdaBelief, LayerwiseOptimizer
from trustratio.optimizers.adabelief import length_of_average

from ..reference import REFERENCES
from .canonical_case import GRADIENTS, WEIGHTS, parameter, two_steps
from .kernel_runs import needs_compiler


def steps(optimizer: LayerwiseOptimizer, w: torch.nn.Parameter, gradients: Any) -> list[float]:
    """The weight after each step."""
    weights = []
    for g in gradients:
        w.grad = torch.full_like(w, g)
        optimizer.step()
        weights.append(w.item())
    return weights


def steps_of_first(optimizer: LayerwiseOptimizer, w: torch.nn.Parameter, count: int) -> list[float]:
    """The first element after each step with gradients of one."""
    weights = []
    for _ in range(count):
        w.grad = torch.ones_like(w)
        optimizer.step()
        weights.append(w[0, 0].item())
    return weights


def of_reference(name: str, gradients: Any, **options: Any) -> list[float]:
    w, state, weights = torch.ones(1, dtype=torch.float64), {}, []
    for g in gradients:
        w, _ = REFERENCES[name](w, torch.full_like(w, g), state, **options)
        weights.append(w.item())
    return weights


# AdaBelief ----------------------------------------------------------------------------------------------------------

WORKED = (0.9988889, 0.9977209, 0.9974402)


def test_worked_example() -> None:
    w = parameter(1.0)
    optimizer = AdaBelief([w], eps=1e-8, rectify=False)
    variances = []
    for g, expected in zip((1.0, 1.0, -1.0), WORKED, strict=True):
        assert steps(optimizer, w, [g]) == pytest.approx([expected], abs=5e-8)
        variances.append(optimizer.state[w]["exp_avg_var"].item())
    assert variances == pytest.approx((0.00081001, 0.00146531, 0.0026109), abs=5e-8)
    assert of_reference("adabelief", (1.0, 1.0, -1.0), lr=1e-3, eps=1e-8, rectify=False) == pytest.approx(
        WORKED, abs=5e-8
    )


def test_the_rectified_step_begins_at_the_sixth_update() -> None:
    lengths = length_of_average(0.999, torch.arange(1, 7, dtype=torch.float64))
    assert lengths.tolist()[3:] == pytest.approx((3.9975, 4.9960, 5.9942), abs=5e-5)
    w = parameter(1.0)
    optimizer = AdaBelief([w], eps=0.0)
    before = steps(optimizer, w, [1.0, -1.0, 1.0, 2.0, 1.0])
    assert before[0] == pytest.approx(1 - 1e-3)  # of SGD, as is the fifth
    assert before[3] - before[4] == pytest.approx(1e-3 * optimizer.state[w]["exp_avg"].item() / (1 - 0.9**5))
    (after,) = steps(optimizer, w, [0.5])
    state = optimizer.state[w]
    direction = (state["exp_avg"] / state["exp_avg_var"].sqrt()).item()
    assert before[-1] - after == pytest.approx(1e-3 * 0.004263276 * direction, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapt": True},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"degenerated_to_sgd": False, "decoupled": False},
        {"fixed_decay": True},
    ],
)
def test_rectified_steps_equal_the_reference(options: dict[str, Any]) -> None:
    given = {"lr": 0.01, "weight_decay": 0.1, **options}
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    expected, state = w.detach().clone(), {}
    optimizer = AdaBelief([w], **given)
    for _ in range(12):
        w.grad = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        expected, ratio = REFERENCES["adabelief"](expected, w.grad, state, **given)
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)
        assert optimizer.trust_ratios() == {"0.0": pytest.approx(ratio, rel=1e-12)}


def test_each_layer_has_its_own_length() -> None:
    """One that gets its first gradient later takes the steps of one that has just begun."""
    late, early = parameter(1.0), parameter(1.0)
    optimizer = AdaBelief([late, early])
    for _ in range(7):
        early.grad = torch.ones_like(early)
        optimizer.step()
    late.grad, before = torch.full_like(late, 3.0), late.item()
    optimizer.step()
    assert before - late.item() == pytest.approx(1e-3 * 3.0)
    assert optimizer.state[late]["step"] == 1


def test_without_the_steps_of_sgd_only_decay_moves_weights_at_first() -> None:
    w = parameter(1.0)
    optimizer = AdaBelief([w], lr=0.1, weight_decay=0.5, degenerated_to_sgd=False)
    assert steps(optimizer, w, [1.0] * 5) == pytest.approx([0.95**t for t in range(1, 6)])
    assert steps(optimizer, w, [-1.0])[0] != pytest.approx(0.95**6, rel=1e-3)


@pytest.mark.parametrize("adapt", [True, None])
@pytest.mark.parametrize("implementation", ["eager", pytest.param("cpu", marks=needs_compiler)])
def test_a_ratio_does_not_undo_how_small_a_decay_is(adapt: bool | None, implementation: str) -> None:
    """Where the direction is the decay alone, ‖w‖/‖u‖ would be 1/λ."""
    w = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = AdaBelief(
        [w], lr=0.1, weight_decay=0.01, degenerated_to_sgd=False, adapt=adapt, implementation=implementation
    )
    assert steps_of_first(optimizer, w, 5) == pytest.approx([0.999**t for t in range(1, 6)])
    assert set(optimizer.trust_ratios().values()) == {1.0}
    assert steps_of_first(optimizer, w, 1)[0] < 0.99
    assert optimizer.trust_ratios()["0.0"] > 1.1


@pytest.mark.parametrize("beta2", [0.0, 1 / 3, 0.5, 0.6])
def test_short_averages_are_never_rectified(beta2: float) -> None:
    w = parameter(1.0)
    optimizer = AdaBelief([w], betas=(0.0, beta2))
    assert steps(optimizer, w, [1.0] * 20) == pytest.approx([1 - 1e-3 * t for t in range(1, 21)])


def test_eps_adds_up_in_the_variance() -> None:
    w = parameter(1.0)
    optimizer = AdaBelief([w], betas=(0.0, 0.5), eps=0.25, rectify=False)  # without momentum g - m is zero
    variances = []
    for _ in range(3):
        steps(optimizer, w, [1.0])
        variances.append(optimizer.state[w]["exp_avg_var"].item())
    assert variances == [0.25, 0.375, 0.4375]


def test_amsgrad_divides_by_the_largest_variance() -> None:
    gradients = [4.0, 0.1, -0.1, 0.1]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.5), "rectify": False}
    w, other = parameter(1.0), parameter(1.0)
    optimizer = AdaBelief([w], amsgrad=True, **options)
    found = steps(optimizer, w, gradients)
    assert found == pytest.approx(of_reference("adabelief", gradients, amsgrad=True, **options), rel=1e-12)
    assert found != pytest.approx(steps(AdaBelief([other], **options), other, gradients), rel=1e-3)
    state = optimizer.state[w]
    assert state["max_exp_avg_var"] > state["exp_avg_var"]


def test_three_kinds_of_decay() -> None:
    options: dict[str, Any] = {"lr": 0.1, "rectify": False, "weight_decay": 0.25}

    def after_one(**more: Any) -> float:
        w = parameter(2.0)
        return steps(AdaBelief([w], **options, **more), w, [1.0])[0]

    quotient = 1 / 0.9  # of m̂ and √ŝ in the first step, whatever the gradient
    assert after_one() == pytest.approx(2 - 0.1 * (quotient + 0.5))
    assert after_one(fixed_decay=True) == pytest.approx(2 - 0.1 * quotient - 0.5)
    assert after_one(decoupled=False) == pytest.approx(2 - 0.1 * quotient)


def test_fixed_decay_is_outside_of_the_ratio() -> None:
    w = parameter(*WEIGHTS)
    optimizer = AdaBelief([w], lr=0.1, rectify=False, weight_decay=0.25, fixed_decay=True, adapt=True)
    w.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert w.tolist() == pytest.approx((3 - 0.1 * 5 - 0.75, 4 - 1))
    assert optimizer.trust_ratios() == {"0.0": pytest.approx(5 * 0.9)}


@pytest.mark.parametrize("options", [{}, {"decoupled": False}, {"rectify": False}])
def test_the_ratio_scales_the_direction_with_its_decay(options: dict[str, Any]) -> None:
    given = {"lr": 0.01, "weight_decay": 0.1, "adapt": True, **options}
    first, second, optimizer = two_steps(AdaBelief, **given)
    w, state = torch.tensor(WEIGHTS, dtype=torch.float64), {}
    for g, expected in zip(GRADIENTS, (first, second), strict=True):
        before = w
        w, ratio = REFERENCES["adabelief"](w, torch.tensor(g, dtype=torch.float64), state, **given)
        assert w.tolist() == pytest.approx(expected, rel=1e-12)
        assert (w - before).norm().item() == pytest.approx(0.01 * before.norm().item())  # as long as LAMB's step
    assert optimizer.trust_ratios()["0.0"] == pytest.approx(ratio)


def test_by_default_no_layer_is_adapted() -> None:
    w = torch.nn.Parameter(torch.ones(2, 2))
    for optimizer_class in (AdaBelief, FastAdaBelief):
        optimizer = optimizer_class([w])
        w.grad = torch.ones(2, 2)
        optimizer.step()
        assert optimizer.trust_ratios() == {"0.0": 1.0}


@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "eager"])
def test_the_difference_to_the_new_mean_keeps_its_digits(implementation: str) -> None:
    """A gradient that hardly changes: the new mean is rounded to the old one, and g - m would be twice what it is."""
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdaBelief([w], betas=(0.5, 0.0), eps=0.0, rectify=False, implementation=implementation)
    w.grad = torch.tensor([1.0])
    optimizer.step()
    optimizer.state[w]["exp_avg"].fill_(1.0)
    w.grad = torch.tensor([1.0 + 2**-23])
    optimizer.step()
    assert optimizer.state[w]["exp_avg_var"].item() == 2.0**-48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "amsgrad=True needs rectify=False"),
        ({"fixed_decay": True, "decoupled": False}, "fixed_decay=True needs decoupled=True"),
        ({"fixed_decay": True, "weight_decay": 1.5}, r"weight_decay must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaBelief([parameter(1.0)], **options)


def test_an_option_of_the_authors_code_is_named() -> None:
    with pytest.raises(TypeError, match=r"weight_decouple.*nearest: decoupled"):
        AdaBelief([parameter(1.0)], weight_decouple=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("optimizer_class", [AdaBelief, FastAdaBelief])
@pytest.mark.parametrize("adapt", [False, True])
def test_a_broken_gradient_shows_in_its_layer_alone(optimizer_class: Any, adapt: bool) -> None:
    broken, whole = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer = optimizer_class([broken, whole], adapt=adapt)
    broken.grad = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    whole.grad = torch.ones_like(whole)
    optimizer.step()
    assert broken.isnan().any()
    assert whole.isfinite().all()
    assert not adapt or broken.isnan().all()


# FastAdaBelief ------------------------------------------------------------------------------------------------------


def test_fast_worked_example() -> None:
    gradients, expected = (1.0, 0.5, -1.0), (0.99986468, 0.99976931, 0.99975748)
    w = parameter(1.0)
    optimizer = FastAdaBelief([w])
    moments = []
    for g, weight in zip(gradients, expected, strict=True):
        assert steps(optimizer, w, [g]) == pytest.approx([weight], abs=5e-9)
        state = optimizer.state[w]
        moments.append([state[name].item() for name in ("exp_avg", "exp_avg_var", "max_exp_avg_var")])
    assert moments == [
        pytest.approx(row, abs=5e-7) for row in ((0.1, 0.729, 0.729), (0.14, 0.45927, 0.729), (0.026, 0.637292, 0.729))
    ]
    assert of_reference("fastadabelief", gradients, lr=1e-3) == pytest.approx(expected, abs=5e-9)


@pytest.mark.parametrize("option", ["constant_lr", "running_maximum", "decoupled"])
def test_other_readings(option: str) -> None:
    gradients = (1.0, 0.5, -1.0)
    given: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, option: option != "running_maximum"}
    w, other = parameter(1.0), parameter(1.0)
    found = steps(FastAdaBelief([w], **given), w, gradients)
    assert found == pytest.approx(of_reference("fastadabelief", gradients, **given), rel=1e-12)
    assert found[-1] != pytest.approx(steps(FastAdaBelief([other], weight_decay=0.1), other, gradients)[-1], rel=1e-6)


def test_without_the_maximum_it_keeps_none() -> None:
    w = parameter(1.0)
    optimizer = FastAdaBelief([w], running_maximum=False)
    steps(optimizer, w, [1.0])
    assert set(optimizer.state[w]) == {"exp_avg", "exp_avg_var", "step"}
