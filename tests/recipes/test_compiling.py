"""What training.compile=true compiles: graphs are captured and run by plain torch, the compiler is torch's matter."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.model import build
from trustratio.recipes.model.build import RecipeParts, build_parts
from trustratio.recipes.model.compiling import compile_regions
from trustratio.recipes.training.loop import seed_step

LENGTH, VOCABULARY = 20, 104
SMALL = ("model.hidden=16", "model.intermediate=32", "model.max_positions=64", "model.layers=4")
MODERN = ("model.architecture=modernbert", "model.local_attention=4", *SMALL)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit


class Graphs:
    """A backend that runs what was captured, and remembers it."""

    def __init__(self) -> None:
        self.captured: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.captured.append(graph)
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found = Graphs()
    monkeypatch.setattr(build, "compile_regions", functools.partial(compile_regions, backend=found))  # type: ignore[arg-type]
    return found


def parts_of(*overrides: str) -> RecipeParts:
    return build_parts(apply_overrides(RecipeConfig(), list(overrides)), VOCABULARY)


def batch(sequences: int, masked: int, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(5, 100, (sequences, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(masked)
    return tokens, positions, tokens.reshape(-1)[positions]


def gradients_of(parts: RecipeParts) -> list[torch.Tensor]:
    seed_step(1, 0, 0)
    parts.model.train()
    parts.model.zero_grad()
    parts.model(*batch(4, 9))[0].backward()
    return [p.grad for p in parts.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("shape", [SMALL, MODERN])
@pytest.mark.parametrize("more", [(), ("model.dropout=0.1",), ("training.activation_checkpointing=true",)])
def test_a_compiled_model_keeps_its_names_and_gradient(
    graphs: Graphs, shape: tuple[str, ...], more: tuple[str, ...]
) -> None:
    plain, compiled = parts_of(*shape, *more), parts_of(*shape, *more, "training.compile=true")
    assert list(dict(compiled.model.named_parameters())) == list(dict(plain.model.named_parameters()))
    expected, found = gradients_of(plain), gradients_of(compiled)
    assert graphs.captured
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "kinds"), [(SMALL, 1), (MODERN, 3)])
def test_layers_that_are_alike_are_compiled_once(graphs: Graphs, shape: tuple[str, ...], kinds: int) -> None:
    """Embeddings, head, and one of each kind of layer: ModernBERT's first has no norm, two of three have windows."""
    gradients_of(parts_of(*shape, "training.compile=true"))
    assert len(graphs.captured) == 2 + kinds


@pytest.mark.parametrize("optimizer", ["vrlamb", "clars"])
def test_statistics_of_gradients_cut_no_graph(graphs: Graphs, optimizer: str) -> None:
    """They look at forwards until the first backward, and inside a graph at none; without that look it is another."""
    parts = parts_of(*SMALL, "training.compile=true", f"optimizer.name={optimizer}")
    assert torch.nn.modules.module._global_forward_hooks
    for _ in range(3):
        gradients_of(parts)
    assert len(graphs.captured) == 2 * (2 + 1)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_another_number_of_masked_tokens_compiles_nothing(graphs: Graphs) -> None:
    model = parts_of(*SMALL, "training.compile=true").model
    model(*batch(4, 9))
    first = len(graphs.captured)
    for masked in (10, 13, 30):
        model(*batch(4, masked))
    assert len(graphs.captured) == first


@pytest.mark.parametrize("shape", [SMALL, MODERN])
def test_shapes_beyond_torchs_own_limit_are_compiled_too(graphs: Graphs, shape: tuple[str, ...]) -> None:
    model = parts_of(*shape, "training.compile=true").model
    model(*batch(2, 9))
    first = len(graphs.captured)
    for length in range(21, 31):
        model(*batch(2, 9, length))
    assert len(graphs.captured) == first + 10 * (first - 1)  # the head goes on with what it has


def test_a_copy_has_a_head_of_its_own(graphs: Graphs) -> None:
    model = parts_of(*SMALL, "training.compile=true").model.eval()
    expected = model(*batch(4, 9))[0].item()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.cls.predictions.bias[0] += 100  # which is never a label
    assert copied(*batch(4, 9))[0].item() > 9 * 50
    assert model(*batch(4, 9))[0].item() == expected


def test_a_pass_without_gradients_is_the_same(graphs: Graphs) -> None:
    plain, compiled = parts_of(*SMALL).model.eval(), parts_of(*SMALL, "training.compile=true").model.eval()
    with torch.no_grad():
        for reduction in ("sum", "none"):
            expected, found = (model(*batch(4, 9), reduction=reduction) for model in (plain, compiled))
            torch.testing.assert_close(found, expected)
