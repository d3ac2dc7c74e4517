"""LARS, LAMB and LAMBC against worked examples in float64 and, where definitions coincide, against timm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LAMBC, LARS

GRADIENTS = [(0.3, -0.4), (0.1, 0.2)]


def two_steps(
    optimizer_class: Any, gradients: list[tuple[float, float]], w0: tuple[float, float] = (3.0, 4.0), **options: Any
) -> tuple[list[list[float]], list[float]]:
    """Weights and ratio after each step of one adapted layer; `lr` may be one number or one per step."""
    w = torch.nn.Parameter(torch.tensor(w0, dtype=torch.float64))
    rates = options.pop("lr")
    rates = rates if isinstance(rates, tuple) else (rates,) * len(gradients)
    optimizer = optimizer_class([("w", w)], lr=rates[0], **{"adapt": True, **options})
    weights, ratios = [], []
    for g, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        weights.append(w.tolist())
        ratios.append(optimizer.trust_ratios()["w"])
    return weights, ratios


@pytest.mark.parametrize(
    ("momentum_form", "second"),
    [
        ("scaled", (2.929299235, 3.979293554)),
        ("gradient", (2.942799235, 3.979293554)),
        ("unscaled", (2.937663433, 3.979293554)),
    ],
)
def test_lars_momentum_forms(momentum_form: str, second: tuple[float, float]) -> None:
    weights, ratios = two_steps(
        LARS, GRADIENTS, lr=(1.0, 0.5), trust_coefficient=0.01, weight_decay=0.1, momentum_form=momentum_form
    )
    assert weights[0] == pytest.approx((2.97, 4.0), abs=1e-9)
    assert weights[1] == pytest.approx(second, abs=1e-9)
    assert ratios == pytest.approx([0.05, 0.06902148779], abs=1e-10)


LAMB_EXAMPLES = {
    "corrected": ({}, (2.963423638, 4.034090611), (2.914872882, 4.046272594)),
    "uncorrected": ({"bias_correction": False}, (2.964255351, 4.034961694), (2.916201485, 4.049018668)),
    "not adapted": ({"weight_decay": 0.0, "adapt": False}, (2.990000033, 4.009999975), (2.981289433, 4.012663337)),
    "no decay": ({"weight_decay": 0.0}, (2.964644676, 4.035355354), (2.916759883, 4.049996656)),
}


@pytest.mark.parametrize(("options", "first", "second"), LAMB_EXAMPLES.values(), ids=LAMB_EXAMPLES)
def test_lamb(options: dict[str, Any], first: tuple[float, float], second: tuple[float, float]) -> None:
    weights, _ = two_steps(LAMB, GRADIENTS, lr=0.01, **options)
    assert weights[0] == pytest.approx(first, abs=1e-9)
    assert weights[1] == pytest.approx(second, abs=1e-9)


def test_lamb_ratios() -> None:
    _, ratios = two_steps(LAMB, GRADIENTS, lr=0.01)
    assert ratios == pytest.approx([3.55111457, 5.390370195], abs=1e-8)


def test_lamb_clips_the_global_norm() -> None:
    ten_times = [(3.0, -4.0), (1.0, 2.0)]
    weights, _ = two_steps(LAMB, ten_times, lr=0.01, max_grad_norm=1.0)
    assert weights[0] == pytest.approx((2.963423633, 4.034090605), abs=1e-9)
    assert weights[1] == pytest.approx((2.913898849, 4.026819262), abs=1e-9)
    unclipped, _ = two_steps(LAMB, ten_times, lr=0.01)
    assert unclipped[1] == pytest.approx((2.914872871, 4.046272577), abs=1e-9)


def test_lamb_clips_over_all_layers_and_groups() -> None:
    a, b = (torch.nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64)) for _ in range(2))
    a.grad, b.grad = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[0.0, 4.0]]).double()
    clipped = LAMB(
        [{"params": [a]}, {"params": [b], "weight_decay": 0.0}], betas=(0.0, 0.0), eps=1.0, max_grad_norm=1.0
    )
    clipped.step()
    # The norm is 5, so a's gradient becomes 3/5 and u = (0.6 / 1.6 + 0.01, 0.02) with decay.
    u = torch.tensor([0.6 / 1.6 + 0.01, 0.02]).double()
    expected = torch.tensor([1.0, 2.0]).double() - 1e-3 * math.sqrt(5) / u.norm() * u
    assert torch.allclose(a.detach()[0], expected, rtol=1e-12)


def test_lamb_with_zero_weights_has_ratio_one() -> None:
    weights, ratios = two_steps(LAMB, GRADIENTS, w0=(0.0, 0.0), lr=0.01)
    assert ratios[0] == 1.0
    assert weights[0] == pytest.approx((-0.009999966667, 0.009999975), abs=1e-11)


def test_lambc() -> None:
    weights, ratios = two_steps(LAMBC, GRADIENTS, lr=0.01)
    assert weights[0] == pytest.approx((2.989700033, 4.009599975), abs=1e-9)
    assert weights[1] == pytest.approx((2.980690463, 4.011862377), abs=1e-9)
    assert ratios == [1.0, 1.0]


def test_trust_bounds_hold_adapted_layers_only() -> None:
    _, ratios = two_steps(LAMB, GRADIENTS, lr=0.01, trust_bounds=(0.01, 0.3))
    assert ratios == pytest.approx([0.3, 0.3])
    _, ratios = two_steps(LAMB, GRADIENTS, lr=0.01, trust_bounds=(0.01, 0.3), adapt=False)
    assert ratios == [1.0, 1.0]


def test_the_default_adapts_by_dimensions_not_by_decay() -> None:
    matrix, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
    for decay in (0.0, 0.1):
        optimizer = LAMB([("matrix", matrix), ("bias", bias)], weight_decay=decay)
        matrix.grad, bias.grad = torch.randn(2, 3), torch.randn(3)
        optimizer.step()
        ratios = optimizer.trust_ratios()
        assert ratios["matrix"] != 1.0
        assert ratios["bias"] == 1.0


# timm ---------------------------------------------------------------------------------------------------------------


def train_pair(ours: Any, theirs: Any, steps: int = 6) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Train two copies of four layers in float64 with the same gradients."""
    torch.manual_seed(0)
    shapes = [(5, 7), (3, 2, 4), (6,), (1,)]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    copies = [[torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2)]
    optimizers = [ours(copies[0]), theirs(copies[1])]
    for _ in range(steps):
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        for parameters, optimizer in zip(copies, optimizers, strict=True):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
    return tuple([p.detach() for p in parameters] for parameters in copies)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": False},
        {"grad_averaging": False},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"max_grad_norm": 1.0},
    ],
)
def test_lamb_equals_timm(timm_optim: Any, options: dict[str, Any]) -> None:
    both = {"lr": 0.02, "weight_decay": 0.01, **options}
    clip = both.pop("max_grad_norm", None)
    ours, theirs = train_pair(
        lambda p: LAMB(p, max_grad_norm=clip, adapt=True, **both),
        lambda p: timm_optim["lamb"].Lamb(p, max_grad_norm=clip, always_adapt=True, **both),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=0)


def test_lambc_equals_timm(timm_optim: Any) -> None:
    ours, theirs = train_pair(
        lambda p: LAMBC(p, lr=0.02, trust_clip=1.0, adapt=True),
        lambda p: timm_optim["lamb"].Lamb(
            p, lr=0.02, weight_decay=0.01, trust_clip=True, max_grad_norm=None, always_adapt=True
        ),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"nesterov": True}, {"eps": 1e-2}])
def test_lars_in_gradient_form_equals_timm(timm_optim: Any, options: dict[str, Any]) -> None:
    both = {"lr": 0.5, "momentum": 0.9, "eps": 0.0, **options}
    ours, theirs = train_pair(
        lambda p: LARS(p, trust_coefficient=0.02, momentum_form="gradient", adapt=True, **both),
        lambda p: timm_optim["lars"].Lars(p, trust_coeff=0.02, always_adapt=True, **both),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=0)
