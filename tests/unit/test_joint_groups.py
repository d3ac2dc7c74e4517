"""Parameter groups that differ in learning rate, weight decay and `adapt` alone: one step for all, the same bits."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trustratio.optimizers import LAMB, OPTIMIZERS, SNGM, LayerwiseOptimizer, TrustRatio, create_optimizer
from trustratio.optimizers.formulas.updates import AdamUpdate
from trustratio.optimizers.kernels import choice
from trustratio.optimizers.stepping import joint_groups
from trustratio.optimizers.stepping.joint_groups import JointGroups

from ..reference import run_reference
from ..swept import SWEPT
from .test_generic import (
    LR,
    OWN_OPTIONS,
    Parameters,
    assert_same_state,
    backward,
    make_gradients,
    make_parameters,
    same,
    state_of,
    values,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*", "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*"
)

Groups = tuple[tuple[tuple[str, ...], dict[str, Any]], ...]

SHAPES: dict[str, tuple[int, ...]] = {
    **{"query": (5, 7), "bias": (6,), "conv": (3, 2, 2, 2), "scalar": ()},
    **{"head": (4, 9), "norm": (9,), "last": (130, 130)},
}
SHAPES_IN_TRITON = {**SHAPES, "last": (50, 45)}
FIRST_THREE = "query", "bias", "conv"
OWN_GROUP: dict[str, dict[str, Any]] = {
    **{
        name: {"momentum": 0.5}
        for name in ("lars", "sngm", "tvlars", "mclr", "cblr", "clars", "vrsgd", "vrlars", "curvature_sgd")
    },
    "fastadabelief": {"beta1": 0.5},
}
"""What the last group has otherwise, so that it is stepped apart: a momentum, or both betas."""

all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def groups_of(name: str) -> Groups:
    """Three that differ in what may be a vector, and a fourth that is stepped apart."""
    own = OWN_GROUP.get(name, {"betas": (0.8, 0.95)})
    return (
        (("query", "bias"), {"weight_decay": 0.1}),
        (("conv", "scalar"), {"lr": 0.7 * LR, "weight_decay": 0.0}),
        (("head",), {"lr": 0.3 * LR, "weight_decay": 0.2, **({"adapt": True} if adapts(name) else {})}),
        (("norm", "last"), {"lr": 0.5 * LR, "weight_decay": 0.1, **own}),
    )


WITHOUT_RATIO = "cowclip", "novograd", "sngm", "vrsgd", "vradam"


def adapts(name: str) -> bool:
    """Whether there is a ratio, and groups may differ in `adapt`."""
    return name not in WITHOUT_RATIO and "adapt" in OPTIMIZERS[name].optimizer_class.vector_options


def make(name: str, parameters: Parameters, groups: Groups, **options: Any) -> LayerwiseOptimizer:
    members = [{"params": [(layer, parameters[layer]) for layer in layers], **of_group} for layers, of_group in groups]
    return create_optimizer(name, members, **{"lr": LR, **OWN_OPTIONS.get(name, {}), **options})


def train(optimizer: Any, parameters: Parameters, steps: range) -> None:
    for step in steps:
        gradients = make_gradients(step, parameters)
        if step == 1:
            del gradients["bias"]
        optimizer.zero_grad()
        backward(parameters, gradients)
        optimizer.step()


def joined(optimizer: LayerwiseOptimizer) -> list[list[int]]:
    """The groups that the last step has taken together."""
    (plan,) = optimizer._plans.values()
    return [list(joint._layer_counts) for joint in plan.joint_groups.values()]


@contextmanager
def one_by_one(name: str) -> Iterator[None]:
    """Groups are stepped as they were before they could be joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPTIMIZERS[name].optimizer_class, "vector_options", ())
        yield


def assert_same_bits(name: str, run: Any) -> LayerwiseOptimizer:
    """Whatever is run, joined groups have the weights, state and ratios of groups that are stepped one by one.

    But for the last bit of a ratio in fp64: torch's square roots of vectors depend on the place in the vector.
    """
    parameters, optimizer = run()
    with one_by_one(name):
        expected, reference = run()
        assert joined(reference) == []
    assert same(values(parameters), values(expected))
    assert_same_state(state_of(optimizer), state_of(reference))
    assert optimizer.trust_ratios() == pytest.approx(reference.trust_ratios(), rel=1e-15, abs=0, nan_ok=True)
    assert optimizer.adapted_layers() == reference.adapted_layers()
    return optimizer  # type: ignore[no-any-return]


# Results ------------------------------------------------------------------------------------------------------------


@all_optimizers
def test_joined_groups_equal_the_reference_in_fp64(name: str) -> None:
    parameters = make_parameters(torch.float64, SHAPES)
    before, groups = values(parameters), groups_of(name)
    optimizer = make(name, parameters, groups)
    train(optimizer, parameters, range(4))
    given = {
        layer: {"lr": LR, **OWN_OPTIONS.get(name, {}), **options} for layers, options in groups for layer in layers
    }
    gradients = [make_gradients(step, parameters) for step in range(4)]
    del gradients[1]["bias"]
    expected, ratios = run_reference(name, before, gradients, given, resolution=torch.finfo(torch.float64).eps)
    tolerance = 1e-6 if name in ("mclr", "cblr") else 1e-9  # their median is an fp32 number
    for layer, w in expected.items():
        torch.testing.assert_close(parameters[layer].detach(), w, rtol=tolerance, atol=tolerance)
    assert optimizer.trust_ratios() == pytest.approx(ratios[-1], rel=tolerance)
    assert list(optimizer.trust_ratios()) == list(SHAPES)
    assert joined(optimizer) == [[0, 1, 2]]


IMPLEMENTATIONS = [
    *((name, implementation) for name in OPTIMIZERS for implementation in ("eager", "cpu")),
    *((name, "triton") for name in SWEPT),
]


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_joined_groups_have_the_bits_of_single_ones(name: str, implementation: str) -> None:
    needs(implementation)
    shapes, steps = (SHAPES_IN_TRITON, 2) if implementation == "triton" else (SHAPES, 3)

    def run() -> Any:
        parameters = make_parameters(torch.float32, shapes)
        optimizer = make(name, parameters, groups_of(name), implementation=implementation)
        train(optimizer, parameters, range(steps))
        return parameters, optimizer

    assert joined(assert_same_bits(name, run)) == [[0, 1, 2]]


def needs(implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    try:
        choice.choose(implementation, torch.device("cpu"))
    except choice.ImplementationError as error:
        pytest.skip(str(error))


VARIANTS = [
    ("lars", {"momentum_form": "unscaled", "nesterov": True}),
    ("lars", {"momentum_form": "gradient"}),
    ("lamb", {"max_grad_norm": 1.0, "update_clip": 0.5}),
    ("lans", {"update_clip": 0.5}),
    ("vrlamb", {"max_grad_norm": 1.0}),
    ("stableadamw", {"decay_form": "unclipped"}),
    ("stableadamw", {"decay_form": "fixed"}),
    ("adabelief", {"rectify": False, "adapt": None, "decoupled": False}),
    ("adabelief", {"rectify": False, "fixed_decay": True}),
    ("fastadabelief", {"decoupled": True, "adapt": True}),
    ("adashift", {"reduction": None, "adapt": None}),
    ("cblr", {"statistic": "mean"}),
    ("cblr", {"statistic": "norm"}),
    ("lamb", {"state_dtype": "bfloat16"}),
]


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_variants_have_the_bits_of_single_groups(name: str, options: dict[str, Any], implementation: str) -> None:
    needs(implementation)

    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make(name, parameters, groups_of(name)[:3], **options, implementation=implementation)
        train(optimizer, parameters, range(3))
        return parameters, optimizer

    assert joined(assert_same_bits(name, run)) == [[0, 1, 2]]


@pytest.mark.parametrize("implementation", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("master", ["stochastic", "kahan"])
def test_weights_of_sixteen_bits_have_the_bits_of_single_groups(master: str, implementation: str) -> None:
    """One group's weights are fp32, so that nothing of it is rounded where it is stepped alone."""
    needs(implementation)

    def run() -> Any:
        parameters = make_parameters(torch.bfloat16, SHAPES_IN_TRITON)
        for layer in ("conv", "scalar"):
            parameters[layer] = torch.nn.Parameter(parameters[layer].detach().float())
        optimizer = make("lamb", parameters, groups_of("lamb"), master=master, implementation=implementation)
        train(optimizer, parameters, range(2))
        return parameters, optimizer

    assert joined(assert_same_bits("lamb", run)) == [[0, 1, 2]]


def test_rows_of_two_embeddings_groups() -> None:
    def run() -> Any:
        parameters = make_parameters(torch.float32, {"one": (6, 4), "other": (5, 3), "third": (4, 4)})
        groups = (
            (("one",), {"weight_decay": 0.1, "cowclip": True}),
            (("other",), {"weight_decay": 0.0, "lr": 0.01, "cowclip": True}),
            (("third",), {"weight_decay": 0.3}),
        )
        optimizer: Any = make("cowclip", parameters, groups)
        for step in range(3):
            optimizer.zero_grad()
            optimizer.count_ids("one", torch.tensor([0, 1, 1, 5]))
            optimizer.count_ids("other", torch.tensor([2, 2, 3]))
            backward(parameters, make_gradients(step, parameters))
            optimizer.step()
        return parameters, optimizer

    assert joined(assert_same_bits("cowclip", run)) == [[0, 1]]


@pytest.mark.parametrize("name", ["curvature_sgd", "curvature_adamw"])
def test_samples_of_the_curvature(name: str) -> None:
    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        optimizer = make(name, parameters, groups_of(name), interval=1)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = sum(((p - 0.3) ** 4).sum() * (1 + index) for index, p in enumerate(parameters.values()))
            loss.backward()  # type: ignore[union-attr]
            return loss  # type: ignore[return-value]

        for _ in range(3):
            optimizer.step(closure)
        return parameters, optimizer

    optimizer = assert_same_bits(name, run)
    assert joined(optimizer) == [[0, 1, 2]]
    assert min(optimizer.trust_ratios().values()) < 0.9


@pytest.mark.parametrize(("base_class", "options"), [(torch.optim.SGD, {}), (torch.optim.Adadelta, {"eps": 1e-3})])
def test_a_ratio_around_another_optimizer(base_class: Any, options: dict[str, Any]) -> None:
    """Of which one steps at the rate itself; options of the base are the base's business."""

    def run() -> Any:
        parameters = make_parameters(torch.float32, SHAPES)
        groups = [
            {"params": [(layer, parameters[layer]) for layer in layers], **of_group}
            for layers, of_group in groups_of("lamb")[:3]
        ]
        optimizer = TrustRatio(base_class, groups, lr=LR, trust_bounds=(0.0, 5.0), **options)
        train(optimizer, parameters, range(3))
        return parameters, optimizer

    parameters, optimizer = run()
    assert joined(optimizer) == [[0, 1, 2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrustRatio, "vector_options", ())
        expected, reference = run()
        assert joined(reference) == []
    assert same(values(parameters), values(expected))
    assert optimizer.trust_ratios() == reference.trust_ratios()


def test_an_infinite_norm_without_decay() -> None:
    """A norm that overflows is left out where its factor is zero, as where the group is stepped alone."""

    def run() -> Any:
        parameters = make_parameters(torch.float64, {"one": (2, 2), "other": (2, 2)})
        with torch.no_grad():
            parameters["other"].fill_(1e200)
        groups = (("one",), {"weight_decay": 0.1}), (("other",), {"weight_decay": 0.0})
        optimizer = make("lars", parameters, groups)
        train(optimizer, parameters, range(1))
        return parameters, optimizer

    assert not torch.tensor(list(assert_same_bits("lars", run).trust_ratios().values())).isnan().any()


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


# Costs --------------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


LAYERS = 50


def operations_of_a_step(name: str, groups: int, implementation: str) -> Counter[str]:
    shapes = {f"layer{index}": (3, 2) if index % 2 else (5,) for index in range(LAYERS)}
    parameters = make_parameters(torch.float32, shapes)
    members = [tuple(shapes)[LAYERS // groups * i : LAYERS // groups * (i + 1)] for i in range(groups)]
    options = [{"lr": 0.01 + 0.001 * i, "weight_decay": 0.1 * (i % 2)} for i in range(groups)]
    optimizer = make(name, parameters, tuple(zip(members, options, strict=True)), implementation=implementation)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            torch.stack([p.square().sum() for p in parameters.values()]).sum().backward()
        with Operations() as operations:
            optimizer.step()
    return operations.counts


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@all_optimizers
def test_operations_do_not_grow_with_groups(name: str, implementation: str) -> None:
    """Fifty cost what two cost, and those a few operations more than one, to spread vectors over elements."""
    one, two, fifty = (operations_of_a_step(name, groups, implementation) for groups in (1, 2, 50))
    assert fifty == two
    assert fifty.total() <= one.total() + 60
