"""Runs of parameter groups that are stepped together, beside the same ones one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.kernels import choice

from .test_generic import (
    LR,
    OWN_OPTIONS,
    Parameters,
    assert_same_state,
    backward,
    make_gradients,
    same,
    state_of,
    values,
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


def needs(implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    try:
        choice.choose(implementation, torch.device("cpu"))
    except choice.ImplementationError as error:
        pytest.skip(str(error))
