"""Joint parameter groups while learning rates and other options change, and with formulas of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, OPTIMIZERS, SNGM
from trustratio.optimizers.formulas.updates import AdamUpdate
from trustratio.optimizers.stepping import joint_groups
from trustratio.optimizers.stepping.joint_groups import JointGroups

from .joint_runs import (
    FIRST_THREE,
    SHAPES,
    Groups,
    all_optimizers,
    assert_same_bits,
    groups_of,
    joined,
    make,
    one_by_one,
    train,
)
from .test_generic import (
    LR,
    backward,
    make_gradients,
    make_parameters,
    same,
    values,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*", "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*"
)

# Learning rates -----------------------------------------------------------------------------------------------------


def with_tensors(name: str, dtype: torch.dtype, *indices: int) -> Groups:
    """The groups of an optimizer, some with a tensor for a rate."""
    return tuple(
        (layers, {**options, "lr": torch.tensor(options.get("lr", LR), dtype=dtype)} if index in indices else options)
        for index, (layers, options) in enumerate(groups_of(name))
    )


@pytest.mark.parametrize(
    ("dtype", "indices"), [(torch.float32, (0, 1, 2, 3)), (torch.float64, (0, 1, 2)), (torch.float64, (1,))]
)
@pytest.mark.parametrize("name", ["lamb", "lans", "lars", "sngm", "adabelief", "cowclip"])
def test_rates_that_are_tensors(name: str, dtype: torch.dtype, indices: tuple[int, ...]) -> None:
    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make(name, parameters, with_tensors(name, dtype, *indices))
        train(optimizer, parameters, range(2))
        for index in indices:
            optimizer.param_groups[index]["lr"].mul_(0.5)
        train(optimizer, parameters, range(2, 4))
        return parameters, optimizer

    assert joined(assert_same_bits(name, run)) == [[0, 1, 2]]


def test_a_tensor_that_all_groups_share_stays_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JointGroups, "_vector", lambda *_: pytest.fail("a vector"))
    parameters = make_parameters(torch.float32, SHAPES)
    rate = torch.tensor(LR)
    groups = tuple((layers, {"lr": rate}) for layers, _ in groups_of("lamb"))
    optimizer = make("lamb", parameters, groups)
    train(optimizer, parameters, range(1))
    assert joined(optimizer) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 3])
@all_optimizers
def test_a_rate_of_sixteen_bits_is_the_number_that_it_is(name: str, groups: int, dtype: torch.dtype) -> None:
    def run(kind: Callable[[float], Any]) -> dict[str, torch.Tensor]:
        shapes = {layer: SHAPES[layer] for layer in FIRST_THREE}
        parameters = make_parameters(torch.float64, shapes)
        members = [FIRST_THREE] if groups == 1 else [(layer,) for layer in FIRST_THREE]
        given = tuple((layers, {"lr": kind(LR * (index + 1))}) for index, layers in enumerate(members))
        optimizer = make(name, parameters, given)
        train(optimizer, parameters, range(2))
        assert not same(values(parameters), values(make_parameters(torch.float64, shapes)))
        return values(parameters)

    rounded = run(lambda rate: torch.tensor(rate, dtype=dtype))
    exact = run(lambda rate: float(torch.tensor(rate, dtype=dtype)))
    for layer, expected in exact.items():
        torch.testing.assert_close(rounded[layer], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize("scheduler", ["each its own", "one cycle"])
def test_a_scheduler(scheduler: str, implementation: str) -> None:
    """One cycle sets the betas of all groups anew at each step, the last one's too."""

    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make("lamb", parameters, groups_of("lamb"), implementation=implementation)
        if scheduler == "one cycle":
            schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2, 0.05, 0.1], total_steps=5)
        else:
            functions = [lambda step, power=power: (step + 1.0) ** -power for power in range(4)]
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functions)
        for step in range(4):
            train(optimizer, parameters, range(step, step + 1))
            plans.append(next(optimizer._plans.values()))
            schedule.step()
        return parameters, optimizer

    plans: list[Any] = []
    assert joined(assert_same_bits("lamb", run)) == [[0, 1, 2]]
    assert all(plan is plans[0] for plan in plans[:4])


# What changes in the middle of a run --------------------------------------------------------------------------------


CHANGES: Mapping[str, tuple[Any, list[list[int]]]] = {
    "betas": (lambda optimizer: optimizer.param_groups[1].update(betas=(0.5, 0.9)), []),
    "betas of the last": (lambda optimizer: optimizer.param_groups[2].update(betas=(0.5, 0.9)), [[0, 1]]),
    "back together": (lambda optimizer: optimizer.param_groups[3].update(betas=(0.9, 0.999)), [[0, 1, 2, 3]]),
    "weight decay": (lambda optimizer: optimizer.param_groups[1].update(weight_decay=0.4), [[0, 1, 2]]),
    "all the same": (
        lambda optimizer: [group.update(weight_decay=0.4, lr=0.01) for group in optimizer.param_groups],
        [[0, 1, 2]],
    ),
    "adapt": (lambda optimizer: optimizer.param_groups[0].update(adapt=False), [[0, 1, 2]]),
    "maximize": (lambda optimizer: optimizer.param_groups[1].update(maximize=True), [[0, 1, 2]]),
    "implementation": (lambda optimizer: setattr(optimizer, "implementation", "eager"), [[0, 1, 2]]),
    "state_dtype": (lambda optimizer: optimizer.param_groups[1].update(state_dtype="bfloat16"), []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_option_that_is_set_counts_at_once(change: str) -> None:
    changed, together = CHANGES[change]

    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make("lamb", parameters, groups_of("lamb"))
        train(optimizer, parameters, range(2))
        before = values(parameters)
        changed(optimizer)
        train(optimizer, parameters, range(2, 4))
        assert not same(values(parameters), before)
        return parameters, optimizer

    assert joined(assert_same_bits("lamb", run)) == together


@all_optimizers
def test_a_run_goes_on_from_a_file(name: str) -> None:
    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make(name, parameters, groups_of(name))
        train(optimizer, parameters, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        another = make(name, parameters, tuple((layers, {}) for layers, _ in groups_of(name)))
        another.load_state_dict(saved)
        train(another, parameters, range(2, 4))
        return parameters, another

    assert joined(assert_same_bits(name, run)) == [[0, 1, 2]]
    parameters = make_parameters(torch.float32, SHAPES)
    straight = make(name, parameters, groups_of(name))
    train(straight, parameters, range(4))
    assert same(values(parameters), values(run()[0]))


@pytest.mark.parametrize("name", ["lamb", "clars", "vrlamb"])
def test_a_group_that_is_added(name: str) -> None:
    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        first = {layer: parameters[layer] for layer in FIRST_THREE}
        groups = (("query", "bias"), {"weight_decay": 0.1}), (("conv",), {"lr": 0.01})
        optimizer = make(name, first, groups)
        train(optimizer, first, range(2))
        optimizer.add_param_group({"params": [("head", parameters["head"])], "lr": 0.02, "weight_decay": 0.3})
        train(optimizer, {**first, "head": parameters["head"]}, range(2, 4))
        return parameters, optimizer

    assert joined(assert_same_bits(name, run)) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("frozen", "together"), [(("conv", "scalar"), [[0, 2]]), (("query", "bias"), [[1, 2]]), (("conv", "query"), None)]
)
def test_groups_of_frozen_layers(frozen: tuple[str, ...], together: list[list[int]] | None) -> None:
    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make("lamb", parameters, groups_of("lamb"))
        for layer in frozen:
            parameters[layer].requires_grad_(False)
        trained = {layer: p for layer, p in parameters.items() if p.requires_grad}
        for step in range(2):
            optimizer.zero_grad()
            backward(parameters, {layer: make_gradients(step, parameters)[layer] for layer in trained})
            optimizer.step()
        return parameters, optimizer

    assert joined(assert_same_bits("lamb", run)) == (together or [[0, 1, 2]])


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_wrapper_that_steps_group_by_group(name: str) -> None:
    """As ZeRO-3 does: the others are empty in the meantime."""

    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make(name, parameters, groups_of(name))
        members = [group["params"] for group in optimizer.param_groups]
        for step in range(2):
            optimizer.zero_grad()
            backward(parameters, make_gradients(step, parameters))
            for index in range(len(members)):
                for other, group in enumerate(optimizer.param_groups):
                    group["params"] = members[other] if other == index else []
                optimizer.step()
        for own, group in zip(members, optimizer.param_groups, strict=True):
            group["params"] = own
        return parameters, optimizer

    parameters, optimizer = run()
    with one_by_one(name):
        expected, reference = run()
    assert same(values(parameters), values(expected))
    assert optimizer.trust_ratios() == reference.trust_ratios()


def test_only_neighbours_are_joined() -> None:
    parameters = make_parameters(torch.float32, SHAPES)
    groups = tuple(
        ((layer,), {"lr": 0.01 * index, "betas": (0.9, 0.99 if index in (2, 5) else 0.999)})
        for index, layer in enumerate(SHAPES)
    )
    optimizer = make("lamb", parameters, groups)
    train(optimizer, parameters, range(1))
    assert joined(optimizer) == [[0, 1], [3, 4]]


# Formulas of others -------------------------------------------------------------------------------------------------


class Outside(LAMB):
    """A decay of its own, in words that take a number."""

    seen: list[Any]

    def update(self, group: dict[str, Any], layers: Any) -> AdamUpdate:
        self.seen.append(group)
        float(group["weight_decay"] * group["lr"])
        return super().update(group, layers)


def test_a_subclass_that_says_nothing_gets_its_groups_one_by_one() -> None:
    parameters = make_parameters(torch.float32, SHAPES)
    groups = [{"params": [parameters[x] for x in layers], **options} for layers, options in groups_of("lamb")]
    optimizer = Outside(groups, lr=LR)
    optimizer.seen = []
    train(optimizer, parameters, range(1))
    assert Outside.vector_options == ()
    given = list(map(id, optimizer.param_groups))
    assert list(map(id, optimizer.seen)) in (given, given * 2)  # to measure, and to apply where that is not in one go
    assert joined(optimizer) == []


def test_every_optimizer_of_the_package_joins() -> None:
    assert {name for name, entry in OPTIMIZERS.items() if "lr" not in entry.optimizer_class.vector_options} == set()
    assert {name for name, entry in OPTIMIZERS.items() if "adapt" not in entry.optimizer_class.vector_options} == {
        *("adabelief", "fastadabelief", "adashift")
    }


def test_the_number_zero_is_no_question_to_a_device() -> None:
    """Learning rates on a device that are zero or not: nobody looks."""
    parameters = make_parameters(torch.float32, SHAPES)
    optimizer = make("sngm", parameters, with_tensors("sngm", torch.float32, 0, 1, 2)[:3])
    assert isinstance(optimizer, SNGM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__eq__", lambda *_: pytest.fail("compared"))
        joint_groups.first_of_joined(optimizer)
