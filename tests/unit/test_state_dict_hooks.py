"""torch.optim's hooks of `state_dict` and `load_state_dict`: what they make is what is checked and what is loaded."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LayerwiseOptimizer

from .test_generic import Parameters, all_optimizers, make, make_parameters, train, values

StateDict = dict[str, Any]
Hook = Callable[[torch.optim.Optimizer, StateDict], StateDict | None]
Run = tuple[Parameters, LayerwiseOptimizer]

RENAMED = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "buf", "step": "t"}


def by_name(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    """Find each parameter's state by its name, as torch's documentation of the hook does."""
    adapted = deepcopy(optimizer.state_dict())
    saved, ours = state_dict["param_groups"][0], adapted["param_groups"][0]
    ours.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
    index_of = dict(zip(saved["param_names"], saved["params"], strict=True))
    for index, name in zip(ours["params"], ours["param_names"], strict=True):
        if index_of.get(name) in state_dict["state"]:
            adapted["state"][index] = deepcopy(state_dict["state"][index_of[name]])
    return adapted


def by_name_in_place(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> None:
    state_dict.update(by_name(optimizer, dict(state_dict)))


def renamed(names: dict[str, str]) -> Hook:
    """Give the state other names, in a new dict."""

    def hook(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
        state = {i: {names.get(key, key): v for key, v in s.items()} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    return hook


def started(name: str) -> Run:
    parameters = make_parameters()
    optimizer = make(name, parameters)
    train(optimizer, parameters, range(2))
    return parameters, optimizer


def assert_goes_on(
    source: tuple[Parameters, LayerwiseOptimizer], target: tuple[Parameters, LayerwiseOptimizer]
) -> None:
    """Both train to the same weights; sums over the model may be taken in another order."""
    for parameters, optimizer in (source, target):
        train(optimizer, {layer: parameters[layer] for layer in source[0]}, range(2, 4))
    torch.testing.assert_close(values(target[0]), values(source[0]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hook", [by_name, by_name_in_place])
@all_optimizers
def test_state_is_loaded_by_name(name: str, hook: Hook) -> None:
    parameters, optimizer = started(name)
    reordered = dict(reversed(deepcopy(parameters).items()))
    other = make(name, reordered)
    other.register_load_state_dict_pre_hook(hook)
    other.load_state_dict(optimizer.state_dict())
    assert_goes_on((parameters, optimizer), (reordered, other))


@all_optimizers
def test_state_is_renamed_on_the_way_out_and_back_on_the_way_in(name: str) -> None:
    parameters, optimizer = started(name)
    copies = deepcopy(parameters)
    other = make(name, copies)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(o))
    optimizer.register_state_dict_post_hook(renamed(RENAMED))
    other.register_load_state_dict_pre_hook(renamed({theirs: ours for ours, theirs in RENAMED.items()}))
    state = optimizer.state_dict()
    assert seen == [optimizer]
    assert not RENAMED.keys() & state["state"][0].keys()
    other.load_state_dict(state)
    assert_goes_on((parameters, optimizer), (copies, other))


def test_all_pre_hooks_run_before_the_check_and_what_they_made_is_checked() -> None:
    _, optimizer = started("lamb")
    parameters = make_parameters()
    other = make("lamb", parameters)
    calls: list[str] = []

    def first(_: Any, state_dict: StateDict) -> StateDict:
        calls.append("first")
        return {**state_dict, "param_groups": []}

    other.register_load_state_dict_pre_hook(renamed({"step": "t"}))
    handle = other.register_load_state_dict_pre_hook(first, prepend=True)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(optimizer.state_dict())
    handle.remove()
    with pytest.raises(ValueError, match="lacks the state step"):
        other.load_state_dict(optimizer.state_dict())
    assert calls == ["first"]
    assert not other.state


def test_post_hooks_see_the_loaded_state_and_have_the_last_word() -> None:
    _, optimizer = started("lamb")
    parameters = make_parameters(torch.bfloat16)
    other = make("lamb", parameters)
    dtypes = []

    def change(loading: torch.optim.Optimizer) -> None:
        dtypes.append(loading.state[parameters["matrix"]]["exp_avg"].dtype)
        loading.state[parameters["matrix"]]["exp_avg"].fill_(5.0)
        loading.param_groups[0]["lr"] = 0.25

    other.register_load_state_dict_post_hook(change)
    other.load_state_dict(optimizer.state_dict())
    assert dtypes == [torch.float32]
    assert other.state[parameters["matrix"]]["exp_avg"].eq(5.0).all()
    assert other.param_groups[0]["lr"] == 0.25


def test_loading_leaves_no_hooks_behind() -> None:
    _, optimizer = started("lamb")
    other = LAMB(make_parameters().items())
    for state in (optimizer.state_dict(), {"state": {}, "param_groups": []}, optimizer.state_dict()):
        try:
            other.load_state_dict(state)
        except ValueError:
            assert not state["param_groups"]
    assert not other._optimizer_load_state_dict_pre_hooks
    assert not other._optimizer_load_state_dict_post_hooks
