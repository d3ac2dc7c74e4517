"""Parameters that the model no longer uses are noticed, and what only looks like them is left in peace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from trustratio.optimizers import LAMB, LayoutError
from trustratio.optimizers.sharding import abandoned_parameters


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each walk over all objects of the process."""
    found: list[int] = []
    look = abandoned_parameters.living
    monkeypatch.setattr(abandoned_parameters, "living", lambda *kinds: (found.append(1), look(*kinds))[1])
    return found


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


def test_a_copy_that_another_optimizer_trains_later_is_no_replacement(walks: list[int]) -> None:
    """It is looked at when it first has a gradient, and left in peace from then on."""
    loose = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
    optimizer = LAMB(loose)
    network = model()
    optimizer.step()
    assert sum(walks) == 1
    other = torch.optim.SGD(network.parameters())
    for _ in range(5):
        backward(network)
        optimizer.step()
        other.step()
    assert sum(walks) == 2


REPLACING: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict(assign=True)": replace_parameters,
    "a new parameter": lambda network: network.register_parameter("weight", nn.Parameter(torch.ones(3, 3))),
    "set from outside": lambda network: setattr(network, "weight", nn.Parameter(torch.zeros(3, 3))),
}


STEPS_WITHOUT: dict[str, Sequence[int]] = {"never": (), "always": range(7), "once": (2,), "in some steps": (1, 2, 5)}


@pytest.mark.parametrize(
    ("how", "missing_before"),
    [
        *(("load_state_dict(assign=True)", often) for often in STEPS_WITHOUT),
        ("a new parameter", "once"),
        ("set from outside", "in some steps"),
    ],
)
def test_replacements_are_noticed_at_the_first_step_that_would_leave_them_out(how: str, missing_before: str) -> None:
    """Whatever gradients were missing before, and however many steps ago: no weight moves without them."""
    network = model()
    optimizer = LAMB(network.named_parameters())
    for step in range(7):
        optimizer.zero_grad()
        backward(network[0] if step in STEPS_WITHOUT[missing_before] else network)
        optimizer.step()
    REPLACING[how](network[1])
    assert_noticed(optimizer, network)


def test_parameters_that_to_empty_made_are_noticed() -> None:
    with torch.device("meta"):
        network = model()
    optimizer = LAMB(network.named_parameters())
    network.to_empty(device="cpu")
    assert_noticed(optimizer, network)


class Embedded(nn.Module):
    def __init__(self, rows: int = 5) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(rows, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(x[0].long()))


def test_a_resized_embedding_is_noticed_by_its_name() -> None:
    network = Embedded()
    optimizer = LAMB(network.named_parameters())
    other = Embedded(7)  # has gradients and the same names
    backward(other)
    network.linear.zero_grad()
    backward(network)
    optimizer.step()
    network.table = nn.Embedding(9, 3)
    optimizer.zero_grad()
    backward(network)
    with pytest.raises(LayoutError, match=r"table\.weight of shape \(5, 3\) \(now Embedding\.weight\)"):
        optimizer.step()


def test_parameters_that_were_converted_to_another_dtype_are_noticed() -> None:
    network = model()
    optimizer = LAMB(network.named_parameters())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        network.bfloat16()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    network(torch.ones(2, 3, dtype=torch.bfloat16)).square().sum().backward()
    with pytest.raises(LayoutError, match=r"1\.weight of shape"):
        optimizer.step()


def assert_noticed(optimizer: LAMB, network: nn.Module) -> None:
    optimizer.zero_grad()
    backward(network)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    with pytest.raises(LayoutError, match=r"1\.weight of shape \(3, 3\) \(now Linear\.weight\)"):
        optimizer.step()
    for parameter, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=0, equal_nan=True)  # to_empty() may leave NaN


def test_a_replacement_that_is_unused_at_first_is_noticed_once_it_is_used() -> None:
    network = model()
    optimizer = LAMB(network.named_parameters())
    replace_parameters(network[1])
    for _ in range(5):
        optimizer.zero_grad()
        backward(network[0])
        optimizer.step()
    assert_noticed(optimizer, network)


@pytest.mark.parametrize("kind", ["layers", "tied layers", "master weights", "parameters of no module"])
def test_missing_gradients_cost_one_walk(kind: str, walks: list[int]) -> None:
    """As layers are dropped at random, in every step others, and experts stay idle."""
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    if kind == "tied layers":
        network[5].weight = network[4].weight
    own = list(network.parameters())
    if kind in ("master weights", "parameters of no module"):
        own = [nn.Parameter(parameter.detach().clone()) for parameter in own]
    optimizer = LAMB(own)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        optimizer.zero_grad()
        dropped = torch.rand(len(own), generator=generator) < 0.3
        for parameter, without in zip(own, dropped, strict=True):
            if not without and kind != "parameters of no module":
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert sum(walks) == 1


def test_all_gradients_there_cost_no_walk(walks: list[int]) -> None:
    network = model()
    optimizer = LAMB(network.named_parameters())
    for _ in range(3):
        backward(network)
        optimizer.step()
    assert not walks
