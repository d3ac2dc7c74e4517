"""Tensors that share memory are refused by name, before anything is stepped twice; views that do not are stepped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, LayoutError
from trustratio.optimizers.sharding import memory
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard

BUFFER = torch.arange(48.0)


def twice(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor, tensor.detach()


OVERLAPPING = {
    "the same": twice(BUFFER.clone().view(6, 8)),
    "transposed": (BUFFER.view(6, 8), BUFFER.view(6, 8).T),
    "one element": (BUFFER[:20], BUFFER[19:]),
    "columns": (BUFFER.view(6, 8)[:, :5], BUFFER.view(6, 8)[:, 4:]),
    "every other one": (BUFFER[::2], BUFFER[::3]),
    "in other dtypes": (BUFFER[:20], BUFFER.view(torch.bfloat16)[39:60]),
    "inside": (BUFFER, BUFFER[7:9]),
}
APART = {
    "neighbours": (BUFFER[:20], BUFFER[20:]),
    "columns": (BUFFER.view(6, 8)[:, :5], BUFFER.view(6, 8)[:, 5:]),
    "every other one": (BUFFER[::2], BUFFER[1::2]),
    "in other dtypes": (BUFFER[:20], BUFFER.view(torch.bfloat16)[40:60]),
    "channels last": (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.ones(3)),
    "empty": (BUFFER, BUFFER[:0]),
}
ITSELF = {
    "expanded": torch.ones(3, 1).expand(3, 4),
    "windows": BUFFER.as_strided((5, 4), (2, 1)),
}


def stepped(tensors: Any, optimizer_class: Any = LAMB) -> list[torch.nn.Parameter]:
    ps = [torch.nn.Parameter(tensor) for tensor in tensors]
    for p in ps:
        p.grad = torch.ones(p.shape, dtype=p.dtype)
    optimizer_class([(f"layer{index}", p) for index, p in enumerate(ps)], lr=0.1).step()
    return ps


@pytest.mark.parametrize("kind", OVERLAPPING)
@pytest.mark.parametrize("optimizer_class", [LAMB, LARS])
def test_layers_in_the_same_memory_are_refused(kind: str, optimizer_class: Any) -> None:
    before = [tensor.clone() for tensor in OVERLAPPING[kind]]
    with pytest.raises(LayoutError, match=r"layer[01] lies in the memory of layer[01]\. Tie layers"):
        stepped(OVERLAPPING[kind], optimizer_class)
    assert all(torch.equal(a, b) for a, b in zip(OVERLAPPING[kind], before, strict=True))


@pytest.mark.parametrize("kind", ITSELF)
def test_a_layer_that_overlaps_itself_is_refused(kind: str) -> None:
    with pytest.raises(LayoutError, match="layer0 has elements that share memory with each other"):
        stepped([ITSELF[kind]])


@pytest.mark.parametrize("kind", APART)
def test_views_of_one_buffer_are_stepped(kind: str) -> None:
    tensors = [tensor.clone() if kind == "channels last" else tensor for tensor in APART[kind]]
    expected = stepped([tensor.clone() for tensor in tensors])
    for p, wanted in zip(stepped(tensors), expected, strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_given_twice_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    with pytest.raises(LayoutError, match=r"0\.1 was given twice"):
        LAMB([p, p]).step()


def test_tied_layers_are_one_parameter() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = LAMB(model.named_parameters())
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["0.weight"]


def test_layers_that_are_tied_by_their_data_after_a_step_are_refused_when_a_plan_is_made() -> None:
    one, other = (torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    other.data = one.data
    for p in (one, other):
        p.grad = torch.ones(4, 3)
    with pytest.raises(LayoutError, match=r"decoder lies in the memory of encoder|encoder lies in the memory of dec"):
        LARS([{"params": [("encoder", one)]}, {"params": [("decoder", other)]}], lr=0.1).step()


LAYOUT = Layout(
    backend="test",
    tensors=(torch.zeros(20), torch.zeros(6)),
    groups=(0, 0),
    layers=(Layer("one", (8,), 0), Layer("two", (10,), 0), Layer("three", (6,), 1)),
    shards=(Shard(0, 0, 0, 8), Shard(1, 8, 0, 10), Shard(2, 0, 0, 6)),
)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ((Shard(0, 0, 0, 8), Shard(1, 7, 0, 10), Shard(2, 0, 0, 6)), "one and two overlap in one tensor"),
        ((Shard(0, 0, 0, 8), Shard(1, 0, 0, 10), Shard(2, 0, 0, 6)), "one and two overlap in one tensor"),
        ((Shard(1, 0, 0, 10), Shard(0, 2, 0, 8), Shard(2, 0, 0, 6)), "two and one overlap in one tensor"),
        ((Shard(0, 0, 0, 8), Shard(1, 11, 0, 10), Shard(2, 0, 0, 6)), r"two is at \[11, 21\) of a tensor of 20"),
        ((Shard(0, -1, 0, 8), Shard(1, 8, 0, 10), Shard(2, 0, 0, 6)), r"one is at \[-1, 7\)"),
        ((Shard(0, 0, 0, 8), Shard(1, 8, 0, 10), Shard(2, 1, 0, 6)), r"three is at \[1, 7\) of a tensor of 6"),
    ],
)
def test_shards_that_overlap_or_leave_their_tensor_are_refused(shards: tuple[Shard, ...], message: str) -> None:
    LAYOUT.prove()
    with pytest.raises(LayoutError, match=message):
        replace(LAYOUT, shards=shards).prove()


@dataclass
class OnMetal:
    """As much of a tensor on an Apple GPU as is looked at: its address is the handle of its buffer, plus the offset."""

    handle: int
    offset: int
    elements: int
    device: torch.device = field(default_factory=lambda: torch.device("mps"))
    is_meta: bool = False

    def numel(self) -> int:
        return self.elements

    def element_size(self) -> int:
        return 4

    def storage_offset(self) -> int:
        return self.offset

    def data_ptr(self) -> int:
        return self.handle + 4 * self.offset

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.elements,)

    def stride(self) -> tuple[int, ...]:
        return (1,)


def test_buffers_whose_handles_are_neighbours_are_apart() -> None:
    """Buffers of 400 bytes, 64 bytes from handle to handle; the second one has two views."""
    tensors = [OnMetal(64, 0, 100), OnMetal(128, 0, 60), OnMetal(128, 60, 40), OnMetal(192, 0, 100)]
    assert [*memory._clusters(tensors)] == [[0], [1], [2], [3]]
    assert [*memory._clusters([*tensors, OnMetal(128, 99, 1)])] == [[0], [1], [2, 4], [3]]
