"""The option `update_clip`: the layer's step divided by max(1, RMS / update_clip)."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, OPTIMIZERS, LayerwiseOptimizer, StableAdamW, create_optimizer

CLIPPED = [
    name for name, entry in OPTIMIZERS.items() if "update_clip" in inspect.signature(entry.optimizer_class).parameters
]
REFUSED = ["adabelief", "fastadabelief", "adashift", "cowclip", "curvature_adamw", "novograd"]
BETAS = (0.9, 0.5)
CALM, WILD = (1.0, -1.0, 1.0, -1.0, 1.0, -1.0), (9.0, -1.0, 1.0, -1.0, 1.0, -1.0)
EXCESS = math.sqrt((81 / (2 / 3 * 81 + 1 / 3) + 5) / 6)
"""RMS in the second step, with β₂ = 1/2: v is the mean of both squares with weights 1/3 and 2/3."""


def stepped(name: str, gradients: list[tuple[float, ...]], **options: Any) -> tuple[torch.Tensor, LayerwiseOptimizer]:
    """What the last step changes, of a matrix that is adapted and without decay."""
    w = torch.nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64).reshape(2, 3))
    given = {"lr": 0.01, "betas": BETAS, "weight_decay": 0.0, "eps": 0.0, **options}
    optimizer = create_optimizer(name, [("w", w)], **given)
    before = w.detach().clone()
    for gradient in gradients:
        before = w.detach().clone()
        optimizer.zero_grad()
        for _ in range(2 if optimizer.group_statistics else 1):
            (w * torch.tensor(gradient, dtype=torch.float64).reshape(2, 3)).sum().backward()
        optimizer.step()
    return w.detach() - before, optimizer


@pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")
@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("update_clip", [0.5, 1.0, EXCESS * 1.01])
def test_the_step_and_the_ratio_are_divided(name: str, update_clip: float) -> None:
    plain, without = stepped(name, [CALM, WILD], update_clip=None)
    change, optimizer = stepped(name, [CALM, WILD], update_clip=update_clip)
    if name == "lans":  # whose gradients are normalised first
        v = (torch.tensor(CALM).square() / 6 + 2 * torch.tensor(WILD).square() / 86) / 3
        expected = max(1.0, ((torch.tensor(WILD).square() / 86) / v).mean().sqrt().item() / update_clip)
    else:
        expected = max(1.0, EXCESS / update_clip)
    first = 1.0 if update_clip >= 1 else 1.0 / update_clip  # of the step before, from which both go on
    torch.testing.assert_close(change * expected, plain, rtol=1e-6 if first == 1.0 else 0.02, atol=0)
    ratio = optimizer.trust_ratios()["w"] * expected
    assert ratio == pytest.approx(without.trust_ratios()["w"], rel=1e-6 if first == 1.0 else 0.02)


def test_lambs_ratio_would_undo_a_clip_of_the_direction() -> None:
    """So that it scales the rate instead, also beyond the bounds of the ratio."""
    _, optimizer = stepped("lamb", [CALM, WILD], update_clip=1.0, trust_bounds=(0.3, 0.3))
    assert optimizer.trust_ratios()["w"] == pytest.approx(0.3 / EXCESS, rel=1e-9)
    _, optimizer = stepped("lamb", [CALM, WILD], update_clip=1.0, adapt=False)
    assert optimizer.trust_ratios()["w"] == pytest.approx(1 / EXCESS, rel=1e-9)


def test_lamb_without_ratio_is_stableadamw() -> None:
    clipped, _ = stepped("lamb", [CALM, WILD, CALM], update_clip=1.0, adapt=False, weight_decay=0.1)
    stable, _ = stepped("stableadamw", [CALM, WILD, CALM], weight_decay=0.1)
    torch.testing.assert_close(clipped, stable, rtol=1e-14, atol=0)


def test_clipping_the_models_gradient_comes_first() -> None:
    """A gradient that is clipped to where it was before has not outgrown anything."""
    _, optimizer = stepped("lamb", [CALM, tuple(9 * g for g in CALM)], update_clip=1.0, max_grad_norm=math.sqrt(6))
    _, without = stepped("lamb", [CALM, CALM], max_grad_norm=math.sqrt(6))
    assert optimizer.trust_ratios()["w"] == pytest.approx(without.trust_ratios()["w"], rel=1e-9)


def test_groups_may_differ() -> None:
    ps = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    groups = [{"params": ps[:1], "update_clip": 0.5}, {"params": ps[1:2]}, {"params": ps[2:], "update_clip": 0.25}]
    optimizer = LAMB(groups, adapt=False, betas=BETAS)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert list(optimizer.trust_ratios().values()) == pytest.approx([0.5, 1.0, 0.25], rel=1e-6)
    optimizer.param_groups[1]["update_clip"] = 0.1
    optimizer.step()
    assert list(optimizer.trust_ratios().values()) == pytest.approx([0.5, 0.1, 0.25], rel=1e-6)


def test_without_bias_correction_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"update_clip=1.0 needs bias_correction=True, got False"):
        LAMB([torch.nn.Parameter(torch.ones(2))], update_clip=1.0, bias_correction=False)
    optimizer = LAMB([torch.nn.Parameter(torch.ones(2))], update_clip=1.0)
    optimizer.param_groups[0]["bias_correction"] = False
    with pytest.raises(ValueError, match=r"group 0: update_clip=1\.0 needs"):
        optimizer.step()


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_has_no_meaning_it_is_refused_with_the_reason(name: str) -> None:
    kind = OPTIMIZERS[name].optimizer_class
    reason = kind.refused_options["update_clip"]
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match=kind.__name__) as error:
        kind([parameter], lr=0.1, update_clip=1.0)  # type: ignore[call-arg]
    assert reason in str(error.value)
    with pytest.raises(ValueError, match=f"{name} has no option 'update_clip'") as refused:
        create_optimizer(name, [parameter], lr=0.1, update_clip=1.0)
    assert reason in str(refused.value)
    with pytest.raises(ValueError, match="has no group option 'update_clip'") as of_group:
        kind([{"params": [parameter], "update_clip": 1.0}], lr=0.1)
    assert reason in str(of_group.value)


def test_every_relative_of_adam_has_it_or_says_why_not() -> None:
    adams = {name for name, entry in OPTIMIZERS.items() if "betas" in entry.defaults} | {"fastadabelief"}
    assert adams == {*CLIPPED, *REFUSED}


@pytest.mark.parametrize("name", [name for name in CLIPPED if name != "stableadamw"])
def test_files_from_before_the_option_leave_it_as_it_is(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = create_optimizer(name, [parameter], lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["update_clip"]
    other = create_optimizer(name, [parameter], lr=0.1, update_clip=0.5)
    other.load_state_dict(saved)
    assert other.param_groups[0]["update_clip"] == 0.5
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["update_clip"] is None
    state = optimizer.__getstate__()
    del state["param_groups"][0]["update_clip"]
    del state["defaults"]["update_clip"]
    revived = type(optimizer).__new__(type(optimizer))
    revived.__setstate__(state)
    assert revived.param_groups[0]["update_clip"] is None
    assert revived.defaults["update_clip"] is None


def test_names_of_other_codes_are_answered() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"no group option 'clip_threshold' .*nearest: update_clip"):
        StableAdamW([{"params": [parameter], "clip_threshold": 1.0}])
    with pytest.raises(ValueError, match=r"no group option 'decouple_lr' .*weight_decay divided by"):
        StableAdamW([{"params": [parameter], "decouple_lr": True}])


# Numbers at the edge --------------------------------------------------------------------------------------------------

IMPLEMENTATIONS = ["eager", "cpu"]


def fp32_step(implementation: str, gradient: list[float], **options: Any) -> tuple[torch.Tensor, float]:
    w = torch.nn.Parameter(torch.ones(len(gradient)))
    optimizer = StableAdamW([("w", w)], lr=0.1, weight_decay=0.0, implementation=implementation, **options)
    w.grad = torch.tensor(gradient)
    optimizer.step()
    return w.detach(), optimizer.trust_ratios()["w"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_elements_without_a_second_moment_add_nothing(implementation: str) -> None:
    w, ratio = fp32_step(implementation, [0.0, 0.0, 3.0, 4.0], update_clip=0.1)
    assert ratio == pytest.approx(0.1 * math.sqrt(2), rel=1e-6)
    assert w[:2].tolist() == [1.0, 1.0]
    w, ratio = fp32_step(implementation, [0.0, 0.0, 3.0, 4.0], update_clip=0.1, eps=0.0)
    assert ratio == pytest.approx(0.1 * math.sqrt(2), rel=1e-6)
    assert w.isnan().tolist() == [True, True, False, False]  # 0/0, as in torch's AdamW


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_that_fp32_does_not_have(implementation: str, size: float) -> None:
    """Below, ε is the larger one; above, the second moment is infinite, and the step zero, as in AdamW."""
    w, ratio = fp32_step(implementation, [size, -size])
    assert ratio == 1.0
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_gradient_breaks_its_layer_visibly(implementation: str, broken: float) -> None:
    ws = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = StableAdamW([("a", ws[0]), ("b", ws[1])], implementation=implementation)
    ws[0].grad, ws[1].grad = torch.tensor([1.0, broken, 1.0]), torch.ones(3)
    optimizer.step()
    assert ws[0].isnan().all()
    assert math.isnan(optimizer.trust_ratios()["a"])
    assert ws[1].isfinite().all()
    assert optimizer.trust_ratios()["b"] == 1.0
