"""Parameter groups that differ in learning rate, weight decay and `adapt` alone: one step for all, the same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trustratio.optimizers import OPTIMIZERS, TrustRatio

from ..reference import run_reference
from ..swept import SWEPT
from .joint_runs import (
    SHAPES,
    SHAPES_IN_TRITON,
    all_optimizers,
    assert_same_bits,
    groups_of,
    joined,
    make,
    needs,
    train,
)
from .test_generic import (
    LR,
    OWN_OPTIONS,
    backward,
    make_gradients,
    make_parameters,
    same,
    values,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*", "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*"
)

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


@pytest.mark.filterwarnings("ignore:.*weights that have a gradient did not move.*", "ignore:implementation .* serves.*")
@pytest.mark.parametrize("implementation", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_groups_of_several_dtypes_and_directions_have_the_bits_of_single_ones(name: str, implementation: str) -> None:
    """Some ascend, some have no gradient at some steps, and fp64 is left to tensor operations by both of the others."""
    needs(implementation)
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16

    def run() -> Any:
        parameters = make_parameters(torch.float32, {f"layer{i}": (5, 3 + i) if i % 3 else (9,) for i in range(8)})
        for index, layer in enumerate(parameters):
            parameters[layer] = torch.nn.Parameter(parameters[layer].detach().to(dtypes[index % 4]))
        groups = [
            ((layer,), {"lr": 0.01 * (index + 1), "weight_decay": 0.1 * (index % 3), "maximize": index % 3 == 1})
            for index, layer in enumerate(parameters)
        ]
        optimizer = make(name, parameters, tuple(groups), implementation=implementation)
        for step in range(4):
            given = make_gradients(step, parameters)
            optimizer.zero_grad()
            backward(parameters, {layer: g for i, (layer, g) in enumerate(given.items()) if (step + i) % 4})
            optimizer.step()
        return parameters, optimizer

    assert joined(assert_same_bits(name, run)) == [[*range(8)]]


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
