"""A misspelt name of a layer's number is noticed where it is read, and, in this package, where it is assigned."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer
from trustratio.optimizers.formulas.layer_table import LayerTable

READ_BY_THE_STEP = {"moves", "trust_ratio"}


def table() -> LayerTable:
    return LayerTable([], torch.ones(0, dtype=torch.bool), {"step": torch.zeros(0)})


def names_of_layers(optimizer_class: type, context: type[ast.expr_context]) -> Iterator[str]:
    """Yield the NAME of every `layers.NAME` in the class and its bases that is assigned (Store) or read (Load)."""
    for base in optimizer_class.__mro__[: optimizer_class.__mro__.index(LayerwiseOptimizer)]:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if is_attribute and node.value.id == "layers" and isinstance(node.ctx, context):
                yield node.attr


def never_read(optimizer_class: type[LayerwiseOptimizer]) -> set[str]:
    assigned = {*names_of_layers(optimizer_class, ast.Store)}
    return assigned - {*names_of_layers(optimizer_class, ast.Load)} - READ_BY_THE_STEP - {"step"}


def test_a_misspelt_name_that_is_read_is_refused_with_the_nearest() -> None:
    layers = table()
    layers.denominator = torch.ones(0)
    with pytest.raises(AttributeError, match=r"no per-layer numbers named 'denominater'.*there are denominator$"):
        _ = layers.denominater
    with pytest.raises(AttributeError, match=r"there are layers, adapt, trust_ratio, .*step"):
        _ = layers.q


def test_the_name_of_a_method_cannot_be_assigned() -> None:
    with pytest.raises(AttributeError, match=r"'norm' is a method"):
        table().norm = torch.ones(0)  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_algorithm_assigns_is_read(name: str) -> None:
    assert never_read(OPTIMIZERS[name].optimizer_class) == set()


class Misspelt(LayerwiseOptimizer):
    def stages(self, group, layers):
        layers.trust_ration = layers.step


def test_a_misspelt_name_that_is_never_read_is_found() -> None:
    assert never_read(Misspelt) == {"trust_ration"}
