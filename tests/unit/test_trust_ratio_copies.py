"""Copies and pickles of TrustRatio go on bit for bit, whatever its base keeps in attributes."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trustratio.optimizers import TrustRatio

from .test_trust_ratio import Named, assert_same, parameters, train, values


class KeepsFirstRate(torch.optim.Optimizer):
    """SGD with steps relative to the rate that the first group had when it was made, as AdaBound's bounds are."""

    def __init__(self, params: Any, lr: float = 0.1, scale: float = 1.0):
        super().__init__(params, {"lr": lr, "scale": scale})
        self.first_rate = self.param_groups[0]["lr"]
        self.table = {"scale": [scale]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * self.table["scale"][0] / self.first_rate * m)


class KnowsParameters(KeepsFirstRate):
    """Puts the largest of its parameters first."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.largest = max(self.param_groups[0]["params"], key=torch.numel)
        self.me = self

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.largest.sub_(self.param_groups[0]["lr"] * self.largest.grad)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "pickle 0": lambda optimizer: pickle.loads(pickle.dumps(optimizer, protocol=0)),
    "copy of a copy": lambda optimizer: copy.deepcopy(pickle.loads(pickle.dumps(optimizer))),
}


def named_of(optimizer: Any) -> Named:
    groups = optimizer.param_groups
    return [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(("base", "options"), [(KeepsFirstRate, {"scale": 2.0}), (KnowsParameters, {})])
def test_a_copy_has_what_its_base_kept_when_it_was_made(
    base: Any, options: dict[str, Any], scheduled: bool, way: str
) -> None:
    named = parameters()
    optimizer = TrustRatio(base, [{"params": named[:2], "lr": 0.05}, {"params": named[2:]}], lr=0.2, **options)
    if scheduled:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(optimizer, named, range(3))
    if scheduled:
        scheduler.step()
    else:
        optimizer.param_groups[0]["lr"] = 0.03
    other = WAYS[way](optimizer)
    copied = named_of(other)
    train(optimizer, named, range(3, 7))
    train(other, copied, range(3, 7))
    assert_same(copied, named)
    assert other.trust_ratios() == optimizer.trust_ratios()
    assert other.base.param_groups is other.param_groups
    assert other.base.state is other.state


def test_parameters_that_a_base_keeps_are_those_of_the_copy() -> None:
    optimizer = TrustRatio(KnowsParameters, parameters(), lr=0.2)
    other: Any = copy.deepcopy(optimizer)
    assert other.base.largest is named_of(other)[0][1]
    assert other.base.me is other.base


def test_what_stands_in_the_place_of_a_method_is_not_copied() -> None:
    """As torch.compile or a scheduler puts it there, bound to the original."""
    named = parameters()
    optimizer: Any = TrustRatio(KeepsFirstRate, named, lr=0.2)
    plain = type(optimizer.base).step
    optimizer.base.step = lambda: plain(optimizer.base)
    other: Any = copy.deepcopy(optimizer)
    before = values(named)
    train(other, copied := named_of(other))
    assert not any(torch.equal(weights, before[name]) for name, weights in copied)
    train(optimizer, named)
    assert_same(copied, named)


class KnowsIds(KeepsFirstRate):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.matrices = [{id(p) for p in self.param_groups[0]["params"] if p.ndim > 1}]


class KnowsIdsAsText(KeepsFirstRate):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.names = SimpleNamespace(by_id={str(id(p)): "p" for p in self.param_groups[0]["params"]})


class ChoosesItsMethod(KeepsFirstRate):
    """When it is made."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.move = self._sign  # type: ignore[method-assign]

    def move(self, p: Any, lr: float) -> None:
        p.sub_(lr * p.grad)

    def _sign(self, p: Any, lr: float) -> None:
        p.sub_(lr * p.grad.sign())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.move(p, group["lr"])


@pytest.mark.parametrize("way", WAYS)
def test_a_method_that_was_chosen_when_it_was_made_is_that_of_the_copy(way: str) -> None:
    named = parameters()
    optimizer = TrustRatio(ChoosesItsMethod, named, lr=0.1, adapt=False)
    train(optimizer, named, range(2))
    other = WAYS[way](optimizer)
    of_copy = named_of(other)
    assert other.base.move.__self__ is other.base
    for one, of in ((optimizer, named), (other, of_copy)):
        train(one, of, range(2, 4))
    assert_same(of_copy, named)


class LoadsItself(torch.optim.SGD):
    """Keeps its fp32 state of bf16 weights, also when it loads by itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.float32)).lerp_(p.grad.float(), 0.1)
                p.sub_((group["lr"] * m).to(p.dtype))

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        saved = [state["m"] for state in state_dict["state"].values()]
        for state, m in zip(self.state.values(), saved, strict=True):
            state["m"] = m.clone()


def test_state_of_a_base_that_loads_by_itself_keeps_its_dtype() -> None:
    named = parameters(torch.bfloat16)
    train(optimizer := TrustRatio(LoadsItself, named, lr=0.1), named)
    other = TrustRatio(LoadsItself, parameters(torch.bfloat16), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for state, loaded in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert loaded["m"].dtype == torch.float32
        assert torch.equal(state["m"], loaded["m"])


class KnowsWeakly(KeepsFirstRate):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.matrices = weakref.WeakSet(p for p in self.param_groups[0]["params"] if p.ndim > 1)


class HasLock(KeepsFirstRate):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (KnowsIds, r"KnowsIds cannot be copied or pickled, for its attribute matrices knows parameters by their id"),
        (KnowsIdsAsText, r"its attribute names knows parameters by their id"),
        (KnowsWeakly, r"its attribute matrices knows parameters by their id\(\) or by weak references"),
        (HasLock, r"its attribute lock cannot be: .* load the state_dict\(\) of this one"),
    ],
)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_what_a_copy_would_have_wrong_is_refused(base: Any, why: str, way: str) -> None:
    optimizer = TrustRatio(base, parameters(), lr=0.2)
    with pytest.raises(TypeError, match=why):
        WAYS[way](optimizer)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_knows_that_steps_of_zeros_do_not_count(way: str) -> None:
    named = parameters()
    optimizer = TrustRatio(torch.optim.AdamW, named, lr=0.01)
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    other = WAYS[way](optimizer)
    train(optimizer, named)
    train(other, copied := named_of(other))
    assert_same(copied, named)


class Early(torch.optim.SGD):
    """Makes its state when it is constructed."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["scale"] = torch.full_like(p, 2.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad * self.state[p]["scale"])


def test_a_copy_makes_state_for_groups_that_are_added() -> None:
    optimizer: Any = copy.deepcopy(TrustRatio(Early, parameters()[:2], lr=0.1))
    optimizer.add_param_group({"params": parameters()[2:]})
    train(optimizer, named_of(optimizer))
    assert len(optimizer.state) == 4
