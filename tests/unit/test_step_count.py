"""The group key `step`: what schedulers of BERT codes and DeepSpeed's elastic checkpoints read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS, create_optimizer

from .test_generic import LR, Parameters, backward, make_gradients, make_parameters, train

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def two_groups(name: str, parameters: Parameters) -> Any:
    layers = list(parameters.items())
    return create_optimizer(name, [{"params": layers[:2]}, {"params": layers[2:]}], lr=LR)


def counts(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [group["step"] for group in optimizer.param_groups]


@all_optimizers
def test_it_counts_the_steps_that_did_something(name: str) -> None:
    parameters = make_parameters()
    optimizer = two_groups(name, parameters)
    assert counts(optimizer) == [0, 0]
    optimizer.step()
    for p in parameters.values():  # as wrappers do to make the state
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert counts(optimizer) == [0, 0]
    train(optimizer, parameters, range(3))
    assert counts(optimizer) == [3, 3]
    optimizer.zero_grad()
    optimizer.step()
    layer = {"bias": parameters["bias"]}
    backward(layer, make_gradients(4, layer))
    optimizer.step()
    assert counts(optimizer) == [4, 4]
    assert all(type(count) is int for count in counts(optimizer))
    assert "step" not in optimizer.defaults
    assert "step" not in OPTIMIZERS[name].defaults


@all_optimizers
@pytest.mark.parametrize("how", ["state_dict", "older state_dict", "deepcopy", "pickle"])
def test_it_is_kept(name: str, how: str) -> None:
    parameters = make_parameters()
    optimizer = two_groups(name, parameters)
    train(optimizer, parameters, range(3))
    if "state_dict" in how:
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            assert group.pop("step") == 3 if "older" in how else group["step"] == 3
        optimizer = two_groups(name, parameters)
        optimizer.load_state_dict(state)
    else:
        pair = (parameters, optimizer)
        parameters, optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert counts(optimizer) == [3, 3]
    train(optimizer, parameters, [3])
    assert counts(optimizer) == [4, 4]


@all_optimizers
def test_a_schedule_that_reads_it(name: str) -> None:
    """As in NVIDIA's and MLPerf's BERT: the rate is a function of the first group's count."""
    parameters = make_parameters()
    optimizer = two_groups(name, parameters)
    rates = []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = LR * (1 - optimizer.param_groups[0]["step"] / 10)
        rates.append(optimizer.param_groups[0]["lr"])
        train(optimizer, parameters, [step])
    assert rates == pytest.approx([LR, 0.9 * LR, 0.8 * LR])


def test_it_goes_on_from_a_number_that_was_set() -> None:
    parameters = make_parameters()
    optimizer = two_groups("lamb", parameters)
    for group in optimizer.param_groups:  # as a program does that goes on from another phase
        group["step"] = 7038
    train(optimizer, parameters, [0])
    assert counts(optimizer) == [7039, 7039]
    optimizer.add_param_group({"params": [("other", torch.nn.Parameter(torch.ones(2)))]})
    train(optimizer, parameters, [1])
    assert counts(optimizer) == [7040] * 3


def test_a_step_in_several_calls_is_one() -> None:
    """As under DeepSpeed: a call for each group, or for parts of a group."""
    parameters = make_parameters()
    optimizer = two_groups("lamb", parameters)
    groups = optimizer.param_groups
    for step in range(3):
        backward(parameters, make_gradients(step, parameters))
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        optimizer.zero_grad()
        assert counts(optimizer) == [step + 1] * 2
    optimizer = two_groups("lamb", parameters)
    first = optimizer.param_groups[0]
    parts = first["params"]
    for step in range(3):
        backward(parameters, make_gradients(step, parameters))
        for part in parts:
            first["params"] = [part]
            optimizer.param_groups[1]["params"] = []
            optimizer.step()
        assert counts(optimizer) == [step + 1] * 2
