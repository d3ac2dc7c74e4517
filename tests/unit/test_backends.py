"""The interface of backends: what they answer by default, who asks them, and how they put a layout together."""

from __future__ import annotations

import ast
import importlib.metadata
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from trustratio.integrations.layer_norms import LayerNorms
from trustratio.optimizers import LAMB, LayoutError
from trustratio.optimizers.sharding import backends
from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.layout import Layout
from trustratio.optimizers.sharding.layout_builder import LayoutBuilder
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.parts import Part
from trustratio.optimizers.sharding.refusals import refuse_statistics

ROOT = Path(__file__).resolve().parents[2]
OPTIMIZER_MODULE: Any = sys.modules[torch.optim.Optimizer.__module__]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is known but those that the test registers."""
    monkeypatch.setattr(backends, "_known", backends._Known(not_imported={}))


class Flat(Backend):
    """Explains two layers in one flat tensor, of which the second lies first."""

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self.parameters = parameters
        self.published = 0

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout:
        refuse_statistics(optimizer, "it is flat", "something else")
        ((group, flat),) = tensors
        builder = LayoutBuilder("flat")
        builder.carry(group, flat)
        one, other = self.parameters
        builder.add("one", one, Part.all_of(one.shape), other.numel(), 0, one.numel())
        builder.add("other", other, Part.all_of(other.shape), 0, 0, other.numel())
        return builder.layout()

    def publish_weights(self, optimizer: Any) -> None:
        self.published += 1


def flat_optimizer() -> tuple[LAMB, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5, 2))]
    flat = torch.nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in reversed(parameters)]))
    flat.grad = torch.ones_like(flat)
    optimizer = LAMB(parameters)
    optimizer.param_groups[0]["params"] = [flat]
    return optimizer, parameters


@pytest.mark.usefixtures("alone")
def test_a_backend_answers_not_mine_by_default() -> None:
    register_backend(Backend())
    optimizer, parameters = flat_optimizer()
    assert backends.explain(optimizer, [(0, parameters[0])]) is None
    assert backends.tensor_parallel_groups(parameters[0]) == []
    assert backends.find_sources(optimizer, torch.nn.Linear(1, 1)) == []
    assert not backends.may_replace_parameters()
    assert backends.find_gradient_flow(optimizer) is None
    assert backends.find_data_parallel(optimizer).ranks == 1
    assert [group for group, _ in backends.stepped_tensors(optimizer)] == [0]
    backends.publish_weights(optimizer)
    with pytest.raises(LayoutError, match="that the constructor was not given"):
        optimizer.step()


@pytest.mark.usefixtures("alone")
def test_a_backend_of_ones_own_explains_tensors() -> None:
    optimizer, parameters = flat_optimizer()
    backend = Flat(parameters)
    register_backend(backend)
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["one", "other"]
    backends.publish_weights(optimizer)
    assert backend.published == 1
    optimizer, _ = flat_optimizer()
    optimizer.collect_group_norms()
    with pytest.raises(LayoutError, match=r"every single micro-batch of every layer, but it is flat: .*something else"):
        optimizer.step()


@pytest.mark.usefixtures("alone")
def test_a_backend_of_ones_own_steps_while_another_optimizer_is_measured() -> None:
    model = torch.nn.Linear(2, 2)
    norms = LayerNorms(torch.optim.SGD(model.parameters()), model=model)  # asks backends whose any stepped one is
    optimizer, parameters = flat_optimizer()
    register_backend(Flat(parameters))
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["one", "other"]
    norms.remove()


@pytest.mark.usefixtures("alone")
def test_forwards_are_watched_only_where_a_backend_replaces_parameters() -> None:
    class Replacing(Backend):
        def sources(self, optimizer: Any, module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from ()

    register_backend(Backend())
    assert not backends.may_replace_parameters()
    register_backend(Replacing())
    assert backends.may_replace_parameters() == (torch.nn.Module,)


class Counting(Backend):
    """Counts the steps before which it was asked."""

    steps: ClassVar[list[torch.optim.Optimizer]] = []

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps.append(optimizer)


@pytest.mark.parametrize("of_ours", [True, False])
def test_a_wrapper_that_is_imported_late_is_asked_before_the_next_step(
    monkeypatch: pytest.MonkeyPatch, of_ours: bool
) -> None:
    """Whoever steps: an optimizer of another package may have taken the place of ours."""
    monkeypatch.setattr(backends, "_known", backends._Known(not_imported={"late_wrapper": "late_backend"}))
    monkeypatch.setattr(OPTIMIZER_MODULE, "_global_optimizer_pre_hooks", OrderedDict())
    monkeypatch.setattr(Counting, "steps", [])
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    lamb = LAMB([parameter])
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    sgd.step()
    assert backends.given_to([parameter]) == {"LAMB"}
    monkeypatch.setitem(sys.modules, "late_wrapper", ModuleType("late_wrapper"))
    monkeypatch.setitem(sys.modules, "late_backend", ModuleType("late_backend"))
    imported = []
    monkeypatch.setattr(
        backends.importlib, "import_module", lambda name: (imported.append(name), register_backend(Counting()))
    )
    stepping = lamb if of_ours else sgd
    stepping.step()
    stepping.step()
    assert imported == ["late_backend"]
    assert Counting.steps == [stepping, stepping]
    assert backends.given_to([parameter]) == (set() if of_ours else {"LAMB"})


@pytest.mark.usefixtures("alone")
def test_optimizers_that_were_unpickled_are_looked_after_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPTIMIZER_MODULE, "_global_optimizer_pre_hooks", OrderedDict())
    pickled = pickle.dumps(LAMB([torch.nn.Parameter(torch.ones(2, 2))]))
    monkeypatch.setattr(OPTIMIZER_MODULE, "_global_optimizer_pre_hooks", OrderedDict())
    monkeypatch.setattr(backends, "_known", backends._Known(not_imported={}))
    optimizer = pickle.loads(pickled)
    assert backends.given_to(optimizer.param_groups[0]["params"]) == {"LAMB"}
    assert len(OPTIMIZER_MODULE._global_optimizer_pre_hooks) == 1


def test_nobody_goes_through_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took most of a sharded optimizer's first step: once per parameter."""
    scans: list[Any] = []
    finder = importlib.metadata.MetadataPathFinder
    monkeypatch.setattr(finder, "find_distributions", lambda *given: scans.append(given) or [])
    optimizer = LAMB([torch.nn.Parameter(torch.ones(2, 2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()
    assert scans == []


def test_every_integration_is_in_the_list() -> None:
    registering = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "integrations").rglob("*.py")
        if re.search(r"^register_backend\(", path.read_text(), re.MULTILINE)
    }
    listed = [module.removeprefix("trustratio.") for module in backends.WRAPPERS.values()]
    # Two folders are imported by their own names, whose `__init__` imports their backend.
    assert registering == {
        f"{module}.backend" if (ROOT / module.replace(".", "/")).is_dir() else module for module in listed
    }


def test_a_builder_puts_shards_in_the_order_of_memory() -> None:
    optimizer, parameters = flat_optimizer()
    layout = Flat(parameters).explain(optimizer, [(0, optimizer.param_groups[0]["params"][0])])
    assert [(layer.name, layer.tensor) for layer in layout.layers] == [("one", 0), ("other", 0)]
    assert [(shard.layer, shard.start, shard.length) for shard in layout.shards] == [(1, 0, 10), (0, 10, 12)]
    assert layout.placed
    layout.prove()


def test_a_builder_keeps_layers_of_which_nothing_is_here() -> None:
    builder = LayoutBuilder("elsewhere")
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    builder.carry(0, torch.empty(0))
    builder.add("weight", parameter, Part((2, 2), (4, 2)))
    layout = builder.layout(clips_with="nothing")
    assert (layout.layers[0].shape, layout.shards, layout.clips_with) == ((4, 2), (), "nothing")


def test_living_objects_are_found_by_their_class() -> None:
    class Kept(torch.nn.Module): ...

    class Foreign:
        @property
        def __class__(self) -> Any:
            raise AssertionError("foreign proxies are not asked")

    kept, foreign = Kept(), Foreign()
    assert list(living(Kept)) == [kept]
    assert {type(one) for one in living(Kept, Foreign)} == {Kept, Foreign}
    del foreign


def test_every_integration_subclasses_the_interface() -> None:
    """So that no question needs to ask whether there is a method."""
    for path in (ROOT / "integrations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Backend"):
                assert [ast.unparse(base) for base in node.bases] == ["Backend"], path
