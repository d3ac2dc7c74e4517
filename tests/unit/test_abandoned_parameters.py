"""Parameters that the model no longer uses are noticed, and what only looks like them is left in peace."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from trustratio.optimizers import LAMB, LayoutError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def backward(network: nn.Module) -> None:
    network(torch.ones(2, 3)).square().sum().backward()


def replace_parameters(network: nn.Module) -> None:
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_replaced_parameters_are_named(steps_before: int) -> None:
    network = model()
    optimizer = LAMB(network.named_parameters())
    for step in range(steps_before + 1):
        if step == steps_before:
            optimizer.zero_grad()
            replace_parameters(network[1])
        backward(network)
        if step < steps_before:
            optimizer.step()
    with pytest.raises(LayoutError, match=r"1\.weight of shape \(3, 3\) \(now Linear\.weight\).*assign=True"):
        optimizer.step()


def test_a_layer_that_was_unused_before_is_noticed_too() -> None:
    network = model()
    optimizer = LAMB(network.named_parameters())
    for _ in range(3):
        backward(network[0])
        optimizer.step()
    replace_parameters(network[1])
    backward(network)
    with pytest.raises(LayoutError, match="the model has other parameters than the optimizer"):
        optimizer.step()


def test_a_twin_that_nobody_trains_is_no_replacement() -> None:
    student, teacher = model(), model()
    optimizer = LAMB(student.named_parameters())
    backward(teacher)
    optimizer.step()
    backward(student[0])
    optimizer.step()


def test_parameters_of_another_optimizer_are_no_replacement() -> None:
    """Parameters outside of modules, all without a gradient, beside a model that is trained."""
    loose = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
    network = model()
    LAMB(loose).step()
    other = torch.optim.SGD(network.parameters())
    backward(network)
    LAMB(loose).step()
    other.step()


def test_master_weights_may_lack_some_gradients() -> None:
    network = model()
    masters = [nn.Parameter(parameter.detach().clone()) for parameter in network.parameters()]
    optimizer = LAMB(masters)
    backward(network[0])
    for master, parameter in zip(masters, network.parameters(), strict=True):
        master.grad = parameter.grad
    optimizer.step()


def test_it_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = 0
    get_objects = gc.get_objects

    def counted() -> list[Any]:
        nonlocal walks
        walks += 1
        return get_objects()

    network = model()
    optimizer = LAMB(network.named_parameters())
    backward(network)
    optimizer.step()
    monkeypatch.setattr(gc, "get_objects", counted)
    optimizer.step()
    assert walks == 0
    optimizer.zero_grad()
    backward(network[0])
    found = []
    for _ in range(9):
        optimizer.step()
        found.append(walks)
    assert found == [1, 2, 2, 3, 3, 3, 3, 4, 4]
