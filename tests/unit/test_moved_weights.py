"""Weights that are moved for a while come back to the bit, whatever happens in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB
from trustratio.optimizers.sharding import backends
from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.moved_weights import MovedWeights


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    values = (torch.tensor([1.0, -0.0, 1e-7, 3e4]), torch.arange(24.0).view(2, 3, 2, 2))
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def bits(tensors: list[torch.nn.Parameter]) -> list[bytes]:
    return [tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_move_and_come_back_to_the_bit(dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    before = bits(weights)
    moved = MovedWeights(LAMB(weights))
    changes = [torch.full_like(weight, 0.1, dtype=torch.float32) for weight in weights]
    moved.move(weights, lambda index, weight: weight.add_(changes[index]))
    assert moved.are_moved
    for weight, original in zip(weights, parameters(dtype), strict=True):
        assert torch.equal(weight, (original.float() + 0.1).to(dtype))
    moved.restore()
    assert not moved.are_moved
    assert bits(weights) == before
    moved.restore()  # nothing
    assert bits(weights) == before


def test_what_lies_in_another_order_keeps_it() -> None:
    weight = torch.nn.Parameter(torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last))
    address, stride = weight.data_ptr(), weight.stride()
    moved = MovedWeights(LAMB([weight]))
    moved.move([weight], lambda _, local: local.mul_(2))
    assert torch.equal(weight, torch.arange(48.0).view(2, 3, 2, 4) * 2)
    moved.restore()
    assert torch.equal(weight, torch.arange(48.0).view(2, 3, 2, 4))
    assert (weight.data_ptr(), weight.stride()) == (address, stride)


def test_they_are_not_moved_twice() -> None:
    weights = parameters()
    moved = MovedWeights(LAMB(weights))
    moved.move(weights, lambda _, local: local.mul_(2))
    with pytest.raises(RuntimeError, match="moved already"):
        moved.move(weights, lambda _, local: local.mul_(2))
    moved.restore()
    assert bits(weights) == bits(parameters())


def test_a_change_that_fails_leaves_all_as_it_was() -> None:
    weights = parameters()

    def change(index: int, local: torch.Tensor) -> None:
        local.mul_(2)
        if index:
            raise ArithmeticError("no")

    moved = MovedWeights(LAMB(weights))
    with pytest.raises(ArithmeticError):
        moved.move(weights, change)
    assert not moved.are_moved
    assert bits(weights) == bits(parameters())


def test_what_was_loaded_meanwhile_is_not_overwritten() -> None:
    weights = parameters()
    moved = MovedWeights(LAMB(weights))
    moved.move(weights, lambda _, local: local.mul_(2))
    with torch.no_grad():
        weights[1].zero_()
    with pytest.raises(RuntimeError, match="changed while they were moved"):
        moved.restore()
    assert not weights[1].any()
    assert moved.are_moved
    for use in (moved.restore, lambda: moved.move(weights, lambda _, local: local.mul_(2))):
        with pytest.raises(RuntimeError, match="load a checkpoint of the model and then the optimizer's state"):
            use()
    assert not weights[1].any()
    moved.forget()
    assert not moved.are_moved
    moved.move(weights, lambda _, local: local.mul_(2))
    moved.restore()


@pytest.mark.parametrize("publish", [True, False])
def test_what_autocast_has_cast_is_forgotten(publish: bool) -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    moved = MovedWeights(LAMB([weight]))
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for change in (
            lambda: None,
            lambda: moved.move([weight], lambda _, local: local.mul_(2), publish=publish),
            lambda: moved.restore(publish=publish),
        ):
            change()
            found.append(torch.nn.functional.linear(torch.ones(1, 4), weight)[0, 0].item())
    assert found == [1.0, 2.0, 1.0]


class Publishing(Backend):
    def __init__(self) -> None:
        self.published: list[float] = []

    def publish_weights(self, optimizer: Any) -> None:
        self.published.append(optimizer.param_groups[0]["params"][0][0].item())


def test_each_move_is_published_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_known", backends._Known(not_imported={}))
    backend = Publishing()
    register_backend(backend)
    weights = parameters()
    moved = MovedWeights(LAMB(weights))
    moved.restore()
    assert backend.published == []
    moved.move(weights, lambda _, local: local.mul_(2))
    assert backend.published == [2.0]
    moved.restore(publish=False)
    assert backend.published == [2.0]
    moved.move(weights, lambda _, local: local.mul_(3), publish=False)
    moved.restore()
    assert backend.published == [2.0, 1.0]
