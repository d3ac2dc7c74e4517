"""Extrapolation on one process: where gradients are taken, what it survives, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, CurvatureSGD, Extrapolation, LayoutError, TrustRatio


class Quadratic(torch.nn.Module):
    """½ L ‖w‖², and a layer of its own shape besides."""

    def __init__(self, curvature: float = 1.0, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
        self.matrix = torch.nn.Parameter(torch.arange(6, dtype=dtype).view(2, 3) + 1)
        self.curvature = curvature

    def forward(self) -> torch.Tensor:
        return self.curvature / 2 * (self.w.square().sum() + self.matrix.square().sum())


def sgd(model: torch.nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def step(model: Quadratic, optimizer: Any, extrapolation: Extrapolation) -> torch.Tensor:
    """Take a step; return where its gradient was taken."""
    optimizer.zero_grad()
    with extrapolation:
        there = model.w.detach().clone()
        model().backward()
    optimizer.step()
    return there


def descend(rate: float, step_size: float, curvature: float) -> float:
    model = Quadratic(curvature)
    optimizer = sgd(model, rate)
    extrapolation = Extrapolation(optimizer, step_size)
    for _ in range(400):
        step(model, optimizer, extrapolation)
    return model.w.norm().item()


@pytest.mark.parametrize(("rate", "curvature"), [(0.1, 10.0), (0.02, 3.0)])
def test_the_bound_of_stability(rate: float, curvature: float) -> None:
    """(γ + 2 · step_size) L < 2."""
    assert descend(rate, (1.9 / curvature - rate) / 2, curvature) < 1e-3
    assert descend(rate, (2.1 / curvature - rate) / 2, curvature) > 1e3


def test_gradients_are_taken_behind_the_last_one() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.25)
    assert torch.equal(step(model, optimizer, extrapolation), torch.tensor([1.0, -2.0]).double())
    before = model.w.detach().clone()
    assert torch.allclose(before, torch.tensor([0.9, -1.8]).double())
    last = torch.tensor([1.0, -2.0]).double()
    assert torch.equal(step(model, optimizer, extrapolation), before - 0.25 * last)
    assert torch.equal(model.w.detach(), before - 0.1 * (before - 0.25 * last))


@pytest.mark.parametrize("direction", ["gradient", "own_gradient", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_bit(direction: str, dtype: torch.dtype) -> None:
    model = Quadratic(dtype=dtype)
    optimizer = LAMB(model.named_parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, 0.3, direction)
    for _ in range(3):
        step(model, optimizer, extrapolation)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with extrapolation:
            assert extrapolation.is_moved
            assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("direction", ["gradient", "own_gradient", "noise"])
def test_a_step_size_of_zero_trains_as_without(direction: str) -> None:
    plain, model = Quadratic(), Quadratic()
    optimizer, other = LAMB(model.named_parameters(), lr=0.1), LAMB(plain.named_parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, 0.0, direction)
    for _ in range(3):
        step(model, optimizer, extrapolation)
        other.zero_grad()
        plain().backward()
        other.step()
    assert torch.equal(model.matrix, plain.matrix)


@pytest.mark.parametrize(
    "make", [LAMB, lambda p, lr: TrustRatio(torch.optim.Adam, p, lr=lr)], ids=["LAMB", "TrustRatio"]
)
def test_any_optimizer_with_several_groups(make: Any) -> None:
    model = Quadratic()
    optimizer = make([{"params": [model.w]}, {"params": [model.matrix]}], lr=0.1)
    extrapolation = Extrapolation(optimizer, 0.25)
    step(model, optimizer, extrapolation)
    before, gradient = model.matrix.detach().clone(), model.matrix.grad.clone()
    with extrapolation:
        assert torch.equal(model.matrix, before - 0.25 * gradient)


def test_noise_is_as_large_as_each_layer() -> None:
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(200, 100), "small": torch.nn.Linear(100, 50)})
    with torch.no_grad():
        model["small"].weight.mul_(1e-3)
        model["small"].bias.zero_()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    extrapolation = Extrapolation(torch.optim.SGD(model.parameters(), lr=0.1), 0.1, "noise", model=model)
    with extrapolation:
        moves = {name: (p.detach() - before[name]).norm() for name, p in model.named_parameters()}
    for name in ("large.weight", "small.weight"):
        assert (moves[name] / before[name].norm()).item() == pytest.approx(0.1, rel=0.03)
    assert moves["small.bias"] == 0


def test_noise_is_drawn_anew_after_each_step_only() -> None:
    model = Quadratic()
    optimizer = sgd(model, lr=0.0)
    extrapolation = Extrapolation(optimizer, 0.1, "noise")

    def there() -> torch.Tensor:
        with extrapolation:
            return model.matrix.detach().clone()

    first = there()
    assert torch.equal(there(), first)
    model().backward()
    optimizer.step()
    second = there()
    assert not torch.equal(second, first)
    assert torch.equal(there(), second)
    with torch.no_grad():
        model.matrix[0, :2] = model.w  # the same numbers in two layers
        moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    with extrapolation:
        moves = {name: p.detach() - moved[name] for name, p in model.named_parameters()}
    sizes = {name: w.norm() / w.numel() ** 0.5 for name, w in moved.items()}
    assert not torch.allclose(moves["matrix"][0, :2] / sizes["matrix"], moves["w"] / sizes["w"])
    other = Extrapolation(optimizer, 0.1, "noise", seed=1)
    with other:
        assert not torch.equal(model.matrix, first)


def test_a_step_before_the_first_move_is_not_counted() -> None:
    """FP16_UnfusedOptimizer steps with zeros when it is made; noise would differ from other wrappers' then."""
    model, stepped = Quadratic(), Quadratic()
    optimizer, other = sgd(model), sgd(stepped)
    extrapolation, early = Extrapolation(optimizer, 0.1, "noise"), Extrapolation(other, 0.1, "noise")
    for parameter in stepped.parameters():
        parameter.grad = torch.zeros_like(parameter)
    other.step()
    with extrapolation, early:
        assert torch.equal(model.matrix, stepped.matrix)


# Steps ---------------------------------------------------------------------------------------------------------------


def test_a_closure_within_the_step() -> None:
    """As torch.optim.LBFGS needs it: the gradient that the closure made is the last one."""
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.25)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        with extrapolation:
            loss = model()
            loss.backward()
        return loss

    for given in ((closure,), ()):
        before = model.w.detach().clone()
        optimizer.step(*given, **({} if given else {"closure": closure}))
        gradient = model.w.grad.clone()
        assert torch.equal(model.w, before - 0.1 * gradient)
        with extrapolation:
            assert torch.equal(model.w, before - 0.1 * gradient - 0.25 * gradient)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("direction", ["gradient", "own_gradient"])
def test_the_last_gradient_is_without_the_loss_scale(direction: str, fused: bool) -> None:
    model = Quadratic(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    extrapolation = Extrapolation(optimizer, 0.25, direction)
    moves = []
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        before = model.w.detach().clone()
        with extrapolation:
            moves.append(before - model.w.detach())
            there = model.w.detach().clone()
            scaler.scale(model() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            gradient = there
            with extrapolation:
                after = model.w.detach().clone()
            assert torch.allclose(model.w - after, 0.25 * gradient, rtol=1e-5)
    # The step of infinite gradients was left out, and the one before counts on.
    assert torch.equal(moves[1], moves[2])
    assert moves[1].any()


def test_the_gradient_of_micro_batches_that_were_dropped_is_none_of_the_own_one() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.25, "own_gradient")
    for set_to_none in (True, False):
        model().backward()
        optimizer.zero_grad(set_to_none)
        before = model.w.detach().clone()
        for _ in range(2):
            (model() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = model.w.detach().clone()
        with extrapolation:
            assert torch.allclose(after - model.w, 0.25 * before)


def test_gradients_that_are_not_finite_count_as_zero() -> None:
    """For whoever takes no step with them; else the weights would be NaN from the next forward on."""
    model = Quadratic()
    for direction in ("gradient", "own_gradient"):
        optimizer = sgd(model, lr=0.0)
        extrapolation = Extrapolation(optimizer, 0.25, direction)
        optimizer.zero_grad()
        (model() + model.w[0] * math.nan).backward()
        with torch.no_grad():
            keep = model.w.clone()
        optimizer.step()
        with torch.no_grad():
            model.w.copy_(keep)
        with extrapolation:
            assert model.w[0] == keep[0]
            assert model.w[1] != keep[1]
        extrapolation.remove()


def test_a_layer_without_gradient_and_a_frozen_one_stay() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.25)
    step(model, optimizer, extrapolation)
    optimizer.zero_grad()
    model.w.square().sum().backward()
    optimizer.step()
    before = model.matrix.detach().clone()
    with extrapolation:
        assert torch.equal(model.matrix, before)
    model.matrix.requires_grad_(False)
    with Extrapolation(optimizer, 0.25, "noise"):
        assert torch.equal(model.matrix, before)
        assert not torch.equal(model.w, model.w.grad)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_size": -0.1}, r"step_size must be in \[0, inf\), got -0.1"),
        ({"step_size": math.nan}, "step_size must be"),
        ({"step_size": "much"}, "step_size must be"),
        ({"direction": "momentum"}, "direction must be one of 'gradient', 'own_gradient', 'noise', got 'momentum'"),
        ({"noise": "cauchy"}, "noise must be one of 'gaussian', 'uniform', got 'cauchy'"),
        ({"seed": None}, "seed must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Extrapolation(sgd(Quadratic()), **{"step_size": 0.1, **arguments})
    extrapolation = Extrapolation(sgd(Quadratic()), 0.1)
    if "step_size" in arguments:
        with pytest.raises(ValueError, match="step_size"):
            extrapolation.step_size = arguments["step_size"]
        assert extrapolation.step_size == 0.1


def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"needs a torch.optim.Optimizer, .* got Linear"):
        Extrapolation(torch.nn.Linear(2, 2), 0.1)


def test_contexts_are_not_nested_and_a_forgotten_one_is_noticed() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.1)
    step(model, optimizer, extrapolation)
    before = model.w.detach().clone()
    extrapolation.__enter__()  # and nobody leaves it
    with pytest.raises(RuntimeError, match="extrapolated already: leave the context"):
        extrapolation.__enter__()
    for wrong in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match="where the weights are extrapolated"):
            wrong()
    assert not torch.equal(model.w, before)
    extrapolation.__exit__(None)
    assert torch.equal(model.w, before)
    optimizer.step()


def test_an_error_within_the_context_gives_the_weights_back() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.1)
    step(model, optimizer, extrapolation)
    before = model.w.detach().clone()
    with pytest.raises(ArithmeticError), extrapolation:
        raise ArithmeticError
    assert torch.equal(model.w, before)
    with extrapolation:
        pass


def test_the_original_weights_within_a_context() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.1)
    step(model, optimizer, extrapolation)
    before = model.w.detach().clone()
    with extrapolation:
        there = model.w.detach().clone()
        with extrapolation.original():
            assert torch.equal(model.w, before)
            optimizer.state_dict()
        assert torch.equal(model.w, there)
    assert torch.equal(model.w, before)


def test_optimizers_that_nobody_explains_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper that is not known steps copies, of which the model would not follow."""
    copies = [torch.nn.Parameter(torch.ones(2))]
    extrapolation = Extrapolation(torch.optim.SGD(copies, lr=0.1), 0.1, "noise")
    monkeypatch.setattr("trustratio.optimizers.displacements.step_layout.observed", _knows_none)
    with pytest.raises(LayoutError), extrapolation:
        pass


def _knows_none(optimizer: Any, model: Any) -> Any:
    from trustratio.optimizers.sharding.observed import ObservedOptimizer

    return ObservedOptimizer(optimizer, [])


def test_another_optimizer_of_the_same_parameters_is_noticed() -> None:
    model = Quadratic()
    given, other = sgd(model), sgd(model)
    extrapolation = Extrapolation(given, 0.1, "noise")
    sgd(Quadratic()).step()
    with pytest.warns(UserWarning, match="was given SGD, but SGD steps its parameters: give it what the wrapper"):
        other.step()
    other.step()
    extrapolation.attach(model)
    model()
    with pytest.raises(RuntimeError, match="was given SGD, but AdamW steps"):
        torch.optim.AdamW(model.parameters()).step()
    extrapolation.remove()
    sgd(model).step()


def test_weights_that_are_changed_while_moved_are_unusable_until_a_load() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.1)
    step(model, optimizer, extrapolation)
    weights, saved, state = (copy.deepcopy(one.state_dict()) for one in (model, optimizer, extrapolation))
    for load in (lambda: optimizer.load_state_dict(saved), lambda: extrapolation.load_state_dict(state)):
        with pytest.raises(RuntimeError, match="changed while they were moved"), extrapolation:
            model.w.detach().zero_()
        assert extrapolation.is_moved
        uses = (optimizer.step, optimizer.state_dict, extrapolation.state_dict, extrapolation.__enter__)
        for use in (*uses, extrapolation.remove):
            with pytest.raises(RuntimeError, match="load a checkpoint of the model and then the optimizer's state"):
                use()
        assert not model.w.any()
        model.load_state_dict(weights)
        load()
        assert not extrapolation.is_moved
        step(model, optimizer, extrapolation)
        model.load_state_dict(weights)


def test_an_evaluation_before_it_in_one_region_of_autocast() -> None:
    """Which keeps what it has cast of the weights."""
    layer = torch.nn.Linear(4, 1, bias=False)
    optimizer = sgd(layer, 0.0)
    extrapolation = Extrapolation(optimizer, 0.5)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            before = layer(torch.ones(1, 4)).item()
            with extrapolation:
                loss = layer(torch.ones(1, 4)).sum()
                loss.backward()
            found += [loss.item() - before, layer(torch.ones(1, 4)).item() - before]
        optimizer.step()
        optimizer.zero_grad()
    assert found == [0.0, 0.0, pytest.approx(-2.0, abs=0.05), 0.0]


def test_samples_of_the_curvature_are_refused() -> None:
    model = Quadratic()
    optimizer = CurvatureSGD(model.named_parameters(), lr=0.1, interval=None)
    extrapolation = Extrapolation(optimizer, 0.1)
    step(model, optimizer, extrapolation)
    optimizer.param_groups[0]["interval"] = 3
    for use in (lambda: Extrapolation(optimizer, 0.1), extrapolation.__enter__):
        with pytest.raises(ValueError, match="Extrapolation cannot go around CurvatureSGD, which takes samples"):
            use()
