"""Steps on devices that have no fp64, as Apple's: on tensors that say they are on one, and keep what MPS forbids.

They raise where a tensor of fp64 would come to be on the device, and where its tensors meet those of the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import OPTIMIZERS, CowClip, LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.formulas.block_sums import sums_in_blocks
from trustratio.optimizers.sharding import local_tensors
from trustratio.optimizers.sharding.local_tensors import has_fp64, numbers_device

from .test_generic import GROUPS_OF_SAMPLES, make_gradients

Tensor = torch.Tensor
MPS = torch.device("mps")
SHAPES = {"matrix": (37, 70), "conv": (3, 2, 2, 2), "bias": (6,), "scalar": ()}
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")


class There(Tensor):
    """A tensor on the device; its numbers are in `here`."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        if here.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=MPS
        )
        made.here = here
        return made

    def __repr__(self, **options: Any) -> str:
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    strangers = [t for t in tensors if type(t) is not There and t.dim()]
    target = kwargs.get("device")
    if any(type(t) is There for t in tensors) and strangers and function not in COPIES:
        raise RuntimeError(f"{function}: tensors on mps and on the CPU")
    on_device = type(tensors[0]) is There if target is None else torch.device(target).type == "mps"
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    found = function(*inner_args, **inner_kwargs)
    if function._schema.is_mutable:
        return args[0] if function._schema.returns else None
    return tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, found) if on_device else found


def _inner(leaf: Any) -> Any:
    return leaf.here if type(leaf) is There else leaf


class Arrivals(TorchFunctionMode):
    """Brings to the device what is made for it or sent there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if function in (Tensor.__getitem__, torch.where) and There in map(type, leaves):
            # Torch asks the device's own code for these.
            assert not any(type(leaf) is Tensor and leaf.dim() for leaf in leaves), "a tensor of the CPU"
            return There(function(*tree_map(_inner, args)))
        if function is Tensor.copy_:
            function(*tree_map(_inner, args), **kwargs)
            return args[0]
        if MPS not in [leaf for leaf in leaves if isinstance(leaf, torch.device)] or There in map(type, leaves):
            return function(*args, **kwargs)
        args, kwargs = tree_map(
            lambda leaf: torch.device("cpu") if isinstance(leaf, torch.device) else leaf, (args, kwargs)
        )
        return There(function(*args, **kwargs).clone())


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local_tensors, "_PLAIN", (Tensor, torch.nn.Parameter, There))
    with Arrivals():
        yield


def pair(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same parameters here and there."""
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    here = {name: torch.nn.Parameter(t.clone()) for name, t in found.items()}
    return here, {name: torch.nn.Parameter(There(t.clone())) for name, t in found.items()}


def backward(parameters: dict[str, Any], optimizer: LayerwiseOptimizer, step: int) -> None:
    """By hand, as torch has no backward on a device that it was built without."""
    for name, gradients in make_gradients(step, parameters).items():
        p = parameters[name]
        p.grad = None if optimizer.statistics is None else p.grad
        for of_group in (gradients / GROUPS_OF_SAMPLES).float():
            g = There(of_group) if type(p) is There else of_group
            if optimizer.statistics is not None:
                optimizer.statistics._see(optimizer.statistics._watched[id(p)], g)
            p.grad = g.clone() if p.grad is None else p.grad.add_(g)


def train(optimizer: LayerwiseOptimizer, parameters: dict[str, Any], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(parameters, optimizer, step)
        optimizer.step()


def assert_same(there: dict[str, Any], here: dict[str, Any]) -> None:
    for name, p in there.items():
        torch.testing.assert_close(p.detach().here, here[name].detach(), rtol=2e-6, atol=2e-7)


def variants() -> list[Any]:
    return [(name, options) for name, entry in OPTIMIZERS.items() for options in ({}, *entry.variants)]


@pytest.mark.parametrize(("name", "options"), variants())
def test_steps_are_as_on_a_cpu(name: str, options: dict[str, Any]) -> None:
    here, there = pair(SHAPES)
    given = {"lr": 0.05, **options}
    expected = create_optimizer(name, list(here.items()), **given, implementation="eager")
    optimizer = create_optimizer(name, list(there.items()), **given)
    train(expected, here, range(2))
    train(optimizer, there, range(2))
    assert_same(there, here)
    # A layer without a gradient is left as it is, beside others.
    for parameters, one in ((here, expected), (there, optimizer)):
        one.zero_grad()
        backward(parameters, one, 2)
        parameters["bias"].grad.zero_()
        one.step()
    assert_same(there, here)
    ratios = optimizer.trust_ratios()
    assert ratios == pytest.approx(expected.trust_ratios(), rel=2e-6)
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    train(expected, here, range(3, 4))
    train(optimizer, there, range(3, 4))
    assert_same(there, here)


@pytest.mark.parametrize("threshold", ["code", "paper"])
def test_rows(threshold: str) -> None:
    here, there = pair({"embedding": (7, 3), "other": (5,)})
    ids = torch.tensor([0, 1, 1, 6])
    for parameters in (here, there):
        groups = [{"params": [parameters["embedding"]], "cowclip": True}, {"params": [parameters["other"]]}]
        optimizer = CowClip(groups, lr=0.1, ratio=1e-2, threshold=threshold, implementation="eager")
        for step in range(3):
            optimizer.zero_grad()
            backward(parameters, optimizer, step)
            optimizer.count_ids(parameters["embedding"], There(ids) if parameters is there else ids)
            optimizer.step()
    assert_same(there, here)


def test_files_and_a_rate_that_is_a_tensor(tmp_path: Path) -> None:
    here, there = pair(SHAPES)
    rate = torch.tensor(0.05)
    expected = create_optimizer("novograd", list(here.items()), lr=rate, implementation="eager")
    optimizer = create_optimizer("novograd", list(there.items()), lr=rate)
    train(expected, here, range(2))
    save_optimizer_state(expected, tmp_path / "state")
    for name, p in there.items():
        p.here.copy_(here[name].detach())
    load_optimizer_state(optimizer, tmp_path / "state")
    train(optimizer, there, range(2, 3))
    train(expected, here, range(2, 3))
    assert_same(there, here)
    save_optimizer_state(optimizer, tmp_path / "other")
    load_optimizer_state(expected, tmp_path / "other")
    train(optimizer, there, range(3, 4))
    train(expected, here, range(3, 4))
    assert_same(there, here)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("squared", [True, False])
def test_sums_in_blocks(squared: bool, size: float) -> None:
    """Numbers whose squares fp32 does not have; all of them alike, so that rounding does not average out."""
    parts = [torch.full((n,), 0.1 * size) for n in (1, 1023, 1024, 1025, 300_000)] + [torch.zeros(5)]
    sums = sums_in_blocks([There(part) for part in parts], squared=squared)
    for found, part in zip(sums, parts, strict=True):
        assert found.device.type == "cpu"
        wide = part.double()
        torch.testing.assert_close(found, (wide.square() if squared else wide).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_sums_that_are_not_finite(bad: float) -> None:
    (found,) = sums_in_blocks([There(torch.tensor([1.0, bad, 2.0]))], squared=True)
    assert not found.isfinite()
    assert bool(found.isnan()) == (bad != bad)


def test_whether_a_device_has_fp64_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def zeros(*shape: int, device: torch.device, **options: Any) -> None:
        tried.append(device)
        raise TypeError("no float64")

    cpu, other = torch.device("cpu"), torch.device("xla", 3)
    assert numbers_device(cpu) == cpu
    assert has_fp64(torch.device("meta"))
    monkeypatch.setattr(torch, "zeros", zeros)
    assert [numbers_device(other), numbers_device(other)] == [cpu, cpu]
    assert tried == [other]
