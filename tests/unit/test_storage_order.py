"""Layers whose elements lie in another order in memory, as channels_last: exact, and without needless copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import OPTIMIZERS, CowClip, LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.kernels import cpu

from .test_generic import GROUPS_OF_SAMPLES

Tensor = torch.Tensor
IMPLEMENTATIONS = ["eager", *(["cpu"] if cpu.KERNELS.missing() is None else [])]
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.clone().to(memory_format=torch.channels_last),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "with gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}
SHAPE = (6, 5, 3, 4)

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")


def pair(order: str, count: int = 2) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The same layers in the order of their indices, and in another."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(count)]
    return plain, [torch.nn.Parameter(ORDERS[order](p.detach())) for p in plain]


def backward(layers: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in layers:
        gradients = torch.randn(GROUPS_OF_SAMPLES, *SHAPE, generator=generator).mul(8).round() / 8
        for g in gradients:
            (p * g).sum().backward()


def train(optimizer: LayerwiseOptimizer, layers: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(layers, step)
        optimizer.step()


def assert_same(one: list[torch.nn.Parameter], other: list[torch.nn.Parameter]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "cowclip"])
def test_the_order_changes_nothing(name: str, order: str, implementation: str) -> None:
    plain, other = pair(order)
    for layers in (plain, other):
        train(
            create_optimizer(name, layers, lr=0.05, weight_decay=0.1, implementation=implementation), layers, range(3)
        )
    assert_same(other, plain)


class LargeCopies(TorchDispatchMode):
    """Counts operations that make or write a copy of at least a whole layer."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.numel and not function.is_view:
            self.seen.append(str(function))
        return result


@pytest.mark.skipif(len(IMPLEMENTATIONS) == 1, reason="built without a C compiler")
@pytest.mark.parametrize("gradient", ["like the weight", "in order"])
@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "novograd", "sngm", "tvlars"])
def test_a_step_copies_no_layer(name: str, gradient: str) -> None:
    _, layers = pair("channels last")
    optimizer = create_optimizer(name, layers, lr=0.05, implementation="cpu")
    for step in range(3):
        for p in layers:
            g = torch.ones(SHAPE)
            p.grad = g.to(memory_format=torch.channels_last) if gradient == "like the weight" else g
        with LargeCopies(layers[0].numel()) as copies:
            optimizer.step()
        if step:
            # A gradient in another order than its weight must be put in order.
            assert len(copies.seen) == (0 if gradient == "like the weight" else 2 * len(layers)), copies.seen


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_of_either_order_continues(implementation: str) -> None:
    """State of older files is in the order of the indices; a model may be converted after some steps."""
    plain, other = pair("channels last")
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "implementation": implementation}
    optimizer, continued = create_optimizer("lamb", plain, **options), create_optimizer("lamb", other, **options)
    train(optimizer, plain, range(2))
    train(continued, other, range(2))
    state = copy.deepcopy(continued.state_dict())
    for kept in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            assert kept[key].is_contiguous(memory_format=torch.channels_last)
            kept[key] = kept[key].contiguous()
    continued.load_state_dict(state)
    train(continued, other, range(2, 4))
    train(optimizer, plain, range(2, 3))
    for p in plain:
        p.data = p.data.to(memory_format=torch.channels_last)
    train(optimizer, plain, range(3, 4))
    assert_same(other, plain)


@pytest.mark.parametrize(("saved", "loaded"), [("channels last", "plain"), ("plain", "channels last")])
def test_files_have_the_order_of_the_indices(saved: str, loaded: str, tmp_path: Path) -> None:
    plain, last = pair("channels last")
    named = {"plain": plain, "channels last": last}
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    one, other = (
        create_optimizer("lamb", [(f"layer{i}", p) for i, p in enumerate(named[kind])], **options)
        for kind in (saved, loaded)
    )
    train(one, named[saved], range(2))
    save_optimizer_state(one, tmp_path / "state")
    load_optimizer_state(other, tmp_path / "state")
    train(one, named[saved], range(2, 4))
    train(other, named[loaded], range(2, 4))
    assert_same(named[loaded], named[saved])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", ["segments", "rows"])
def test_what_goes_by_index_is_right_in_any_order(cut: str, implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 4, generator=generator)
    ratios, weights = [], []
    for w in (whole.clone(), whole.T.contiguous().T):
        p = torch.nn.Parameter(w)
        optimizer: LayerwiseOptimizer
        if cut == "segments":
            optimizer = create_optimizer("lamb", [{"params": [("w", p)], "segments": 3}], lr=0.1)
        else:
            optimizer = CowClip([("w", p)], lr=0.1, ratio=1e-3, cowclip=True)
        optimizer.implementation = implementation
        for step in range(3):
            p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            if isinstance(optimizer, CowClip):
                optimizer.count_ids(p, torch.tensor([0, 1, 1, 5]))
            optimizer.step()
        ratios.append(optimizer.trust_ratios())
        weights.append(p)
    assert ratios[0] == pytest.approx(ratios[1], rel=2e-6)
    torch.testing.assert_close(weights[0], weights[1], rtol=2e-6, atol=2e-7)
