"""Frozen parameters take no part in a step, whatever they are, and are looked at when they are thawed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import LAMB, LayoutError
from trustratio.optimizers.sharding import local_tensors

from .test_torch_contract import Packed, train, weights


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.usefixtures("one_rank")
def test_under_fully_shard_they_have_no_state_and_are_not_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded, plain = model(), model()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = []
    for module in (sharded, plain):
        module[1].requires_grad_(False)
        optimizers.append(LAMB(module.named_parameters(), lr=0.1))
        step(module, optimizers[-1])
    frozen = list(sharded[1].parameters())
    assert not any(optimizers[0].state.get(p) for p in frozen)
    assert len(optimizers[0].state) == 4
    assert not {*map(id, frozen)} & {*map(id, next(iter(optimizers[0]._plans.values())).tensors)}
    for module, optimizer in zip((sharded, plain), optimizers, strict=True):
        module[1].requires_grad_(True)
        module[0].requires_grad_(False)
        step(module, optimizer)
        step(module, optimizer)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(local_tensors.local_part(sharded.get_parameter(name)), p, rtol=1e-6, atol=1e-7)
    assert optimizers[0].trust_ratios() == pytest.approx(optimizers[1].trust_ratios(), rel=1e-6)
    counts = [int(optimizers[0].state[p]["step"]) for p in sharded.parameters()]
    assert counts == [1, 1, 2, 2, 3, 3]


THAWED: list[tuple[torch.Tensor, Any, str]] = [
    (torch.ones(2, dtype=torch.complex64), ValueError, r"floating point tensors, got guest, torch\.complex64"),
    (torch.ones(3, 2).as_subclass(Packed), LayoutError, r"guest, a Packed.*of shape \(3, 2\)"),
    (torch.ones(3, 2, device="meta"), LayoutError, "one device, got .*guest on meta"),
]


@pytest.mark.parametrize(("value", "error", "message"), THAWED)
def test_a_thawed_one_that_cannot_be_trained_is_named(value: torch.Tensor, error: Any, message: str) -> None:
    guest = torch.nn.Parameter(value, requires_grad=False)
    layers = weights()
    optimizer = LAMB([*layers.items(), ("guest", guest)], lr=0.1)
    train(optimizer, layers, 0)
    guest.requires_grad_(True)
    with pytest.raises(error, match=message):
        train(optimizer, layers, 1)
    guest.requires_grad_(False)
    train(optimizer, layers, 1)


def test_unnamed_layers_keep_their_names() -> None:
    layers = weights()
    layers["matrix"].requires_grad_(False)
    optimizer = LAMB(layers.values(), lr=0.1)
    train(optimizer, layers, 0)
    assert list(optimizer.trust_ratios()) == ["0.1", "0.2", "0.0"]


def test_a_checkpoint_of_a_quantised_model(tmp_path: Path) -> None:
    """The packed weights are no layers, to write or to read."""
    packed = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.uint8), requires_grad=False)
    layers, others = weights(), weights()
    optimizer = LAMB([("packed", packed), *layers.items()], lr=0.1)
    train(optimizer, layers, 0)
    save_optimizer_state(optimizer, tmp_path / "state")
    other = LAMB([("packed", packed), *others.items()], lr=0.1)
    load_optimizer_state(other, tmp_path / "state")
    train(optimizer, layers, 1)
    train(other, others, 1)
    assert all(torch.equal(layers[name], others[name]) for name in layers)
