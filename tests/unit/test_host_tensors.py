"""Tensors of the host are made on the CPU, whatever the default device is."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.integrations.audits.injection import Injection, seeded_weights
from trustratio.integrations.layer_norms import LayerNorms, clip_grad_norm_
from trustratio.integrations.named_layers import named_layers
from trustratio.integrations.transformers import masked_language_modeling_loss
from trustratio.optimizers import OPTIMIZERS, Extrapolation, TrustRatio, create_optimizer
from trustratio.optimizers.noise_scale import gradient_noise
from trustratio.recipes.rules.large_batch import smallest_kept_loss

from .test_devices import default_device
from .test_generic import make_gradients, make_parameters, values

ROOT = Path(__file__).parents[2]
FACTORIES = {
    *(
        "arange",
        "as_tensor",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
    ),
    *("randn", "randperm", "scalar_tensor", "tensor", "zeros", "Generator"),
}
OF_THE_MODEL = {"integrations/audits/models.py"}  # made where the rest of the model is

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")


def without_device(source: str) -> Iterator[int]:
    """The lines of calls that make a tensor on whatever the default device is."""
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
        says_where = any(keyword.arg in ("device", None) for keyword in call.keywords)
        if call.func.attr == "Generator":
            says_where |= bool(call.args)
        if of_torch and call.func.attr in FACTORIES and not says_where:
            yield call.lineno


@pytest.mark.parametrize("folder", ["optimizers", "integrations"])
def test_factories_say_on_which_device(folder: str) -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / folder).rglob("*.py")}
    assert len(files) > 50
    found = [
        f"{name}:{line}"
        for name, path in sorted(files.items())
        if name not in OF_THE_MODEL
        for line in without_device(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.zeros(3)", [1]),
        ("x = 1\ntorch.nn.Parameter(torch.ones(2, dtype=a))", [2]),
        ("torch.zeros(3, device=d)", []),
        ("torch.tensor(a, **options)", []),
        ("torch.Generator()", [1]),
        ("torch.Generator('cpu')", []),
        ("torch.zeros_like(a)", []),
        ("a.new_zeros(3)", []),
        ("math.full(3)", []),
    ],
)
def test_which_factories_are_found(source: str, lines: list[int]) -> None:
    assert list(without_device(source)) == lines


# Whole trainings under another default device -----------------------------------------------------------------------


def train(optimizer: Any, parameters: dict[str, torch.nn.Parameter], way: str | None, steps: int = 3) -> None:
    """With forward, backward and step inside; the samples are on the CPU."""
    for step in range(steps):
        gradients = make_gradients(step, parameters)
        groups = len(next(iter(gradients.values())))
        with default_device(way) if way else torch.device("cpu"):
            optimizer.zero_grad()
            for group in range(groups):
                terms = [(p * (gradients[n][group] / groups).to(p.dtype)).sum() for n, p in parameters.items()]
                torch.stack(terms).sum().backward()
            optimizer.step()


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.group_statistics])
@pytest.mark.parametrize("way", ["context", "set"])
def test_backward_under_another_default_device(name: str, way: str) -> None:
    """Where hooks measure the gradients."""
    found = []
    for inside in (None, way):
        parameters = make_parameters()
        with default_device(inside) if inside else torch.device("cpu"):
            optimizer = create_optimizer(name, list(parameters.items()), lr=0.05)
        train(optimizer, parameters, inside)
        found.append((values(parameters), optimizer.trust_ratios(), gradient_noise(optimizer)))
    assert found[0][1:] == found[1][1:]
    assert all(torch.equal(w, found[1][0][layer]) for layer, w in found[0][0].items())


Bases = dict[str, Callable[[list[tuple[str, torch.nn.Parameter]]], Any]]
WRAPPED: Bases = {
    "trust_ratio": lambda named: TrustRatio(torch.optim.AdamW, named, lr=torch.tensor(0.01, device="cpu")),
    "trust_ratio_of_sgd": lambda named: TrustRatio(torch.optim.SGD, named, lr=0.01, momentum=0.9),
    "collected": lambda named: create_optimizer("lars", named, lr=0.01),
}


@pytest.mark.parametrize("which", WRAPPED)
@pytest.mark.parametrize("way", ["context", "set"])
def test_wrapped_optimizers_under_another_default_device(which: str, way: str) -> None:
    found = []
    for inside in (None, way):
        parameters = make_parameters()
        with default_device(inside) if inside else torch.device("cpu"):
            optimizer = WRAPPED[which](list(parameters.items()))
            if which == "collected":
                optimizer.collect_group_norms()
        train(optimizer, parameters, inside)
        found.append(values(parameters))
    assert all(torch.equal(w, found[1][layer]) for layer, w in found[0].items())


def measured(way: str | None, per_layer: bool | str) -> list[Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    optimizer, answers = torch.optim.SGD(model.parameters(), lr=0.1), []
    with default_device(way) if way else torch.device("cpu"):
        norms = LayerNorms(optimizer, model)
    for _ in range(2):
        samples = torch.ones(2, 5)
        with default_device(way) if way else torch.device("cpu"):
            optimizer.zero_grad()
            model(samples).square().sum().backward()
            clipped = clip_grad_norm_(optimizer, 0.5, per_layer=per_layer)  # type: ignore[arg-type]
            optimizer.step()
            answers += [repr(clipped), dict(norms.latest() or {}), [layer.name for layer in named_layers(model)]]
    return answers


@pytest.mark.parametrize("per_layer", [False, True, "rows"])
@pytest.mark.parametrize("way", ["context", "set"])
def test_norms_and_clipping_under_another_default_device(way: str, per_layer: bool | str) -> None:
    assert measured(way, per_layer) == measured(None, per_layer)


def extrapolated(way: str | None, direction: str) -> dict[str, torch.Tensor]:
    parameters = make_parameters()
    with default_device(way) if way else torch.device("cpu"):
        optimizer = create_optimizer("lamb", list(parameters.items()), lr=0.01)
        extrapolation = Extrapolation(optimizer, step_size=0.1, direction=direction)
    for step in range(3):
        gradients = make_gradients(step, parameters)
        with default_device(way) if way else torch.device("cpu"):
            optimizer.zero_grad()
            with extrapolation:
                terms = [(p * p * gradients[n][0].to(p.dtype)).sum() for n, p in parameters.items()]
                torch.stack(terms).sum().backward()
            optimizer.step()
    return values(parameters)


@pytest.mark.parametrize("direction", ["gradient", "own_gradient", "noise"])
@pytest.mark.parametrize("way", ["context", "set"])
def test_extrapolation_under_another_default_device(way: str, direction: str) -> None:
    expected = extrapolated(None, direction)
    assert all(torch.equal(w, expected[layer]) for layer, w in extrapolated(way, direction).items())


def sampled(way: str | None, name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, samples = torch.nn.Linear(4, 3), torch.ones(2, 4)
    with default_device(way) if way else torch.device("cpu"):
        optimizer = create_optimizer(name, model.named_parameters(), lr=0.01)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(samples).square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", ["curvature_sgd", "curvature_adamw"])
@pytest.mark.parametrize("way", ["context", "set"])
def test_samples_of_the_curvature_under_another_default_device(way: str, name: str) -> None:
    expected = sampled(None, name)
    assert all(torch.equal(w, expected[layer]) for layer, w in sampled(way, name).items())


@pytest.mark.parametrize("way", ["context", "set"])
def test_gradients_of_an_audit_under_another_default_device(way: str) -> None:
    found = []
    for inside in (None, way):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        with default_device(inside) if inside else torch.device("cpu"):
            injection = Injection(model, 2)
            loss = model()
            loss.backward()
            weights = seeded_weights(injection.shapes, seed=1)
            found.append([loss.detach(), injection.gradient("weight"), *weights.values(), model.weight.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("way", ["context", "set"])
def test_losses_and_shares_under_another_default_device(way: str) -> None:
    logits, labels, losses = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, 0, 4]]), torch.randn(100)
    expected = masked_language_modeling_loss((logits,), labels), smallest_kept_loss(losses, 0.3)
    with default_device(way):
        found = masked_language_modeling_loss((logits,), labels), smallest_kept_loss(losses, 0.3)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
