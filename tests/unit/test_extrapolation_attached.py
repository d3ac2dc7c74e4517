"""Extrapolation on one process where a model is attached, and the state of a run that is resumed."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, Extrapolation
from trustratio.optimizers.sharding import moved_weights

from .test_extrapolation import Quadratic, sgd, step


def attached(direction: str = "gradient") -> tuple[Quadratic, torch.optim.Optimizer, Extrapolation]:
    model = Quadratic()
    optimizer = sgd(model)
    return model, optimizer, Extrapolation(optimizer, 0.25, direction).attach(model)


def train(model: Quadratic, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


@pytest.mark.parametrize("direction", ["gradient", "own_gradient", "noise"])
def test_an_attached_model_trains_as_contexts_do(direction: str) -> None:
    model, optimizer, extrapolation = attached(direction)
    train(model, optimizer, 4)
    other = Quadratic()
    other_optimizer = sgd(other)
    by_contexts = Extrapolation(other_optimizer, 0.25, direction)
    for _ in range(4):
        step(other, other_optimizer, by_contexts)
    assert torch.equal(model.w, other.w)
    assert not extrapolation.is_moved


def test_the_weights_stay_until_the_step_or_until_somebody_looks() -> None:
    model, optimizer, extrapolation = attached()
    train(model, optimizer, 1)
    before = model.w.detach().clone()
    for look in (
        lambda: model.eval()(),
        model.state_dict,
        lambda: model.load_state_dict({"w": before, "matrix": model.matrix}),
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: torch.no_grad()(model)(),
    ):
        model.train()()
        assert extrapolation.is_moved
        assert not torch.equal(model.w, before)
        look()
        assert not extrapolation.is_moved
        assert torch.equal(model.w, before)


def test_a_loop_that_calls_another_model_is_noticed() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.25).attach(torch.nn.Sequential(model))
    model().backward()
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"SGD steps, and the model that Extrapolation was attached to was not called"
    ):
        optimizer.step()
    extrapolation.detach()
    optimizer.step()


def test_attaching_and_contexts_do_not_mix() -> None:
    model, _, extrapolation = attached()
    with pytest.raises(RuntimeError, match="a model is attached"):
        extrapolation.attach(model)
    with pytest.raises(RuntimeError, match="a model is attached"), extrapolation:
        pass
    extrapolation.detach()
    with extrapolation, pytest.raises(RuntimeError, match="a context is open"):
        extrapolation.attach(model)


def test_copies_of_an_attached_model_are_on_their_own() -> None:
    model, optimizer, extrapolation = attached()
    train(model, optimizer, 2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied()
        assert not extrapolation.is_moved
        assert torch.equal(copied.w, model.w)


def test_removed_it_does_nothing() -> None:
    model, optimizer, extrapolation = attached()
    train(model, optimizer, 2)
    model()
    extrapolation.remove()
    before = model.w.detach().clone()
    plain = copy.deepcopy(model)
    train(model, optimizer, 2)
    train(plain, sgd(plain), 2)
    assert torch.equal(model.w, plain.w)
    assert not torch.equal(model.w, before)


class Lookahead(torch.optim.Optimizer):
    """Has another step, and moves the weights besides."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)


@pytest.mark.parametrize("attach", [True, False])
def test_a_wrapper_that_moves_weights_besides(attach: bool) -> None:
    model = Quadratic()
    inner = sgd(model)
    outer = Lookahead(inner)
    extrapolation = Extrapolation(outer, 0.25)
    if attach:
        extrapolation.attach(model)
        train(model, outer, 2)
    else:
        for _ in range(2):
            step(model, outer, extrapolation)
    w, last = torch.tensor([1.0, -2.0]).double(), 0.0
    for _ in range(2):
        gradient = w - 0.25 * last
        w, last = 0.5 * (w - 0.1 * gradient), gradient
    assert torch.allclose(model.w, w)


@pytest.mark.parametrize("attach", [True, False])
def test_how_often_a_wrapper_gathers_the_models_weights(attach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step does so itself, and who looks afterwards costs nothing: one rank may do so alone."""
    published: list[Any] = []
    monkeypatch.setattr(moved_weights, "publish_weights", published.append)
    model = Quadratic()
    optimizer = sgd(model)
    extrapolation = Extrapolation(optimizer, 0.25)
    if attach:
        extrapolation.attach(model)
        train(model, optimizer, 4)
    else:
        for _ in range(4):
            step(model, optimizer, extrapolation)
    assert len(published) == (3 if attach else 6)
    model.state_dict(), optimizer.state_dict(), model.eval()()
    assert len(published) == (3 if attach else 6)


# State --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["gradient", "own_gradient", "noise"])
@pytest.mark.parametrize("early", [True, False])
def test_a_resumed_run_goes_on(direction: str, early: bool) -> None:
    model = Quadratic()
    optimizer = LAMB(model.named_parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, 0.25, direction, seed=5)
    for _ in range(3):
        step(model, optimizer, extrapolation)
    file = io.BytesIO()
    torch.save(extrapolation.state_dict(), file)
    resumed = copy.deepcopy(model)
    other = LAMB(resumed.named_parameters(), lr=0.1)
    again = Extrapolation(other, 0.25, direction)
    if not early:
        with again:
            pass
    other.load_state_dict(optimizer.state_dict())
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        step(model, optimizer, extrapolation)
        step(resumed, other, again)
    assert torch.equal(model.matrix, resumed.matrix)


def test_state_that_does_not_fit() -> None:
    model = Quadratic()
    optimizer = sgd(model)
    for direction, message in (
        ("gradient", "steps other layers or has cut them"),
        ("own_gradient", "not those of the"),
    ):
        extrapolation = Extrapolation(optimizer, 0.25, direction)
        step(model, optimizer, extrapolation)
        state = extrapolation.state_dict()
        with pytest.raises(ValueError, match=f"the state is of direction '{direction}', and this one is 'noise'"):
            Extrapolation(optimizer, 0.25, "noise").load_state_dict(state)
        other = Extrapolation(sgd(torch.nn.Linear(2, 2)), 0.25, direction)
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=message), other:
            pass


@pytest.mark.parametrize("direction", ["gradient", "own_gradient", "noise"])
def test_what_was_loaded_is_saved_again(direction: str) -> None:
    model, optimizer, extrapolation = attached(direction)
    train(model, optimizer, 2)
    saved = copy.deepcopy(extrapolation.state_dict())
    other = Quadratic()
    again = Extrapolation(sgd(other), 0.5, direction, seed=9)
    again.load_state_dict(copy.deepcopy(saved))
    pending = again.state_dict()
    with again:
        pass
    for state in (pending, again.state_dict()):
        assert repr(state) == repr(saved)


def test_a_model_is_loaded_where_its_weights_are_lost() -> None:
    model, optimizer, extrapolation = attached()
    train(model, optimizer, 2)
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model().backward()
    model.w.detach().zero_()
    for use in (optimizer.step, model.state_dict, model, extrapolation.detach, extrapolation.detach):
        with pytest.raises(RuntimeError, match="changed while they were moved"):
            use()
    model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="changed while they were moved"):
        model()  # as the optimizer's state is missing still
    optimizer.load_state_dict(saved)
    assert torch.equal(model.w.detach(), weights["w"])
    train(model, optimizer, 1)


def test_state_that_does_not_fit_is_refused_until_another_is_loaded() -> None:
    model, optimizer, extrapolation = attached()
    train(model, optimizer, 1)
    saved = copy.deepcopy(extrapolation.state_dict())
    saved["displacement"]["gradients"][0] = torch.ones(7)
    again = Extrapolation(sgd(Quadratic()), 0.5)
    again.load_state_dict(saved)
    for _ in range(2):
        with pytest.raises(ValueError, match="has a gradient of shape"), again:
            pass
