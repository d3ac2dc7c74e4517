"""What statistics of group gradients cost: operations for each layer and micro-batch, and in a step for all layers."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trustratio.optimizers import create_optimizer
from trustratio.optimizers.gradient_statistics import probes as probes_module
from trustratio.optimizers.gradient_statistics.norms import StatisticsError
from trustratio.optimizers.gradient_statistics.probes import PROBES, LocalProbes, probes
from trustratio.optimizers.gradient_statistics.squares import Bucket
from trustratio.optimizers.gradient_statistics.sums import GroupSums
from trustratio.optimizers.gradient_statistics.unseen import refuse_without_any_group, unseen_layers
from trustratio.optimizers.gradient_statistics.watch import GradientStatistics
from trustratio.optimizers.gradient_statistics.watched import Watched
from trustratio.optimizers.sharding.gradient_flow import Destination, Slice
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard

Shape = tuple[int, ...]
ALIGNED: list[Shape] = [(8, 16), (12,), (4, 3, 2, 8), (1, 8)]
OTHERS: list[Shape] = [(7, 5), (5,), (), (3, 3, 3, 3), (8, 6), (7, 8), (1, 3)]

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def operations(work: Callable[[], Any]) -> Counter[str]:
    with Operations() as counted:
        work()
    return counted.names


def of_training(name: str, shapes: Sequence[Shape]) -> Counter[str]:
    """Operations of the second micro-batch of the second step, when all is made that stays."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = create_optimizer(name, parameters, lr=0.1, implementation="eager")
    for _ in range(2):
        optimizer.zero_grad()
        sum((p * p).sum() for p in parameters).backward()  # type: ignore[union-attr]
        loss = sum((p * p).sum() for p in parameters)
        backward = operations(loss.backward)  # type: ignore[union-attr]
        optimizer.step()
    return backward


@pytest.mark.parametrize(("name", "more"), [("clars", 0), ("vrsgd", 1), ("vrlamb", 1)])
@pytest.mark.parametrize(("shapes", "each"), [(ALIGNED, 3), (OTHERS, 4)])
def test_operations_for_each_layer_in_backward(name: str, more: int, shapes: list[Shape], each: int) -> None:
    """A copy in fp64, two sums, and the squares where they are kept; one more where shapes must be filled up."""
    few = of_training(name, shapes)
    many = of_training(name, shapes * 3)
    plain_few, plain_many = (of_training("lars", s) for s in (shapes, shapes * 3))
    of_layers = (many - plain_many).total() - (few - plain_few).total()
    assert of_layers == (each + more) * 2 * len(shapes)
    assert (few - plain_few).total() - (each + more) * len(shapes) <= 3


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
@pytest.mark.parametrize("shapes", [ALIGNED, OTHERS])
def test_statistics_of_a_step_take_no_more_operations_for_more_layers(
    name: str, shapes: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[Counter[str]] = []
    for_step = GradientStatistics.for_step

    def counting(*args: Any) -> Any:
        with Operations() as counted:
            found = for_step(*args)
        counts.append(counted.names)
        return found

    monkeypatch.setattr(GradientStatistics, "for_step", counting)
    of_training(name, shapes * 2)
    of_training(name, shapes * 5)
    assert counts[1] == counts[3]
    assert counts[1].total() < 110 + 8 * len(shapes)


def test_statistics_that_are_forgotten_take_a_few_operations() -> None:
    counts = []
    for layers in (2, 20):
        parameters = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(layers)]
        optimizer = create_optimizer("vrsgd", parameters, lr=0.1)
        sum((p * p).sum() for p in parameters).backward()  # type: ignore[union-attr]
        counts.append(operations(optimizer.statistics.discard))  # type: ignore[union-attr]
    assert counts[0] == counts[1]


def test_a_tensor_of_many_layers_is_looked_at_once() -> None:
    """As ZeRO's partition is, by its first step of zeros."""
    flat = torch.zeros(40)
    layers = tuple(Layer(str(i), (4,), 0) for i in range(10))
    shards = tuple(Shard(i, 4 * i, 0, 4) for i in range(10))
    layout = Layout("test", (flat,), (0,), layers, shards)
    counted = operations(lambda: refuse_without_any_group("LAMB", layout, [flat]))
    assert counted["aten::any"] == 1
    flat[7] = 1
    assert unseen_layers(layout, [flat]).tolist() == [1] * 10
    assert unseen_layers(layout, [None]).tolist() == [0] * 10
    with pytest.raises(StatisticsError, match="LAMB has gradients but saw no group's gradient"):
        refuse_without_any_group("LAMB", layout, [flat])


# The numbers --------------------------------------------------------------------------------------------------------


def plain_probes(gradient: torch.Tensor) -> torch.Tensor:
    """Element by element."""
    board = torch.zeros(2, 4, dtype=torch.float64)
    matrix = gradient.reshape(1, -1) if gradient.dim() < 2 else gradient.reshape(len(gradient), -1, gradient.shape[-1])
    for row, of_row in enumerate(matrix.reshape(len(matrix), -1, matrix.shape[-1]).double()):
        for column in range(of_row.shape[-1]):
            board[row % 2, column % 4] += of_row[:, column].sum()
    return board.view(-1)


def gradients(dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for shape in ALIGNED + OTHERS:
        yield torch.randn(shape, generator=generator).to(dtype)
    yield torch.randn(6, 4, 8, 8, generator=generator).to(dtype, memory_format=torch.channels_last)
    yield torch.randn(8, 12, generator=generator).to(dtype).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_those_of_the_groups(dtype: torch.dtype) -> None:
    sums = GroupSums()
    groups = list(gradients(dtype))
    rows = [sums.new_row() for _ in groups]
    for factor in (1, 2, 4):
        for row, gradient in zip(rows, groups, strict=True):
            sums.see(row, factor * gradient)
        if factor == 2:
            sums.add_up()  # at the end of a backward pass; else when the next gradient comes, or the sums are read
    found = sums.of(torch.tensor(rows))
    for number, gradient in enumerate(groups):
        norm = gradient.double().norm()
        expected = torch.cat([torch.stack([7 * norm, 21 * norm**2]), 7 * plain_probes(gradient)])
        torch.testing.assert_close(found[:, number], expected, rtol=1e-12, atol=1e-12)
    assert sums.not_finite(torch.device("cpu")) == 0


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1.0, 1e19, 1e30, 3e38])
def test_norms_of_fp32_neither_overflow_nor_underflow(size: float) -> None:
    sums = GroupSums()
    gradient = size * torch.tensor([0.6, 0.8, 1.0, 0.5] * 300)
    sums.see(sums.new_row(), gradient)
    norm, square = sums.of(torch.zeros(1, dtype=torch.long))[:2, 0].tolist()
    expected = math.sqrt(math.fsum(x * x for x in gradient.tolist()))
    assert norm == pytest.approx(expected, rel=1e-12)
    assert square == pytest.approx(expected**2, rel=1e-12)
    assert (norm, square) != (0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_so_until_it_is_forgotten(value: float) -> None:
    sums = GroupSums()
    broken, whole = sums.new_row(), sums.new_row()
    both = torch.tensor([broken, whole])
    sums.see(broken, torch.tensor([1.0, value]))
    sums.see(whole, torch.ones(2))
    assert sums.not_finite(torch.device("cpu")).isnan()
    assert sums.of(both)[:, 1].isfinite().all()
    sums.forget(broken)
    assert sums.not_finite(torch.device("cpu")) == 0
    assert sums.of(both)[0].tolist() == [0, math.sqrt(2)]
    sums.see(broken, torch.tensor([1.0, value]))
    sums.forget(broken)  # while it waits, as the other does
    sums.see(whole, torch.zeros(2))
    assert sums.of(both)[0].tolist() == [0, math.sqrt(2)]
    sums.see(broken, torch.tensor([1.0, value]))
    sums.clear()
    assert sums.of(both).eq(0).all()


def test_parameters_that_come_later_and_on_several_devices() -> None:
    sums = GroupSums()
    first = sums.new_row()
    sums.see(first, torch.ones(4))
    second = sums.new_row()
    assert sums.of(torch.tensor([first, second]))[0].tolist() == [2, 0]  # which was never seen
    sums.see(second, torch.ones(9))
    assert sums.of(torch.tensor([second, first]))[0].tolist() == [3, 2]
    sums.see(sums.new_row(), torch.ones(2, device="meta"))
    assert sorted(map(str, sums._tables)) == ["cpu", "meta"]


# Probes of a step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 64, 1 << 20])
def test_probes_of_a_step_are_those_of_each_layer(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_module, "STACKED_ELEMENTS", {"cpu": limit})
    found = [torch.randn(shape) for shape in (ALIGNED + OTHERS) * 3]
    layers = tuple(Layer(str(i), tuple(g.shape), i) for i, g in enumerate(found))
    shards = tuple(Shard(i, 0, 0, g.numel()) for i, g in enumerate(found) if i != 2)  # of one nothing is here
    layout = Layout("test", tuple(found), (0,) * len(found), layers, shards)
    of_layers = LocalProbes(layout)
    for missing in ((), (0, 11), range(len(found))):
        given = [None if i in missing else g.view(-1) for i, g in enumerate(found)]
        expected = [
            torch.zeros(PROBES, dtype=torch.float64) if g is None or i == 2 else plain_probes(g.view(layers[i].shape))
            for i, g in enumerate(given)
        ]
        torch.testing.assert_close(of_layers(given), torch.stack(expected, dim=1), rtol=1e-12, atol=1e-12)


def test_probes_of_blocks_that_begin_anywhere_add_up() -> None:
    """Layers that are cut in rows or columns on two ranks."""
    whole = [torch.randn(7, 6) for _ in range(4)]
    layers = tuple(Layer(str(i), (7, 6), i) for i in range(4))
    expected = torch.stack([plain_probes(g) for g in whole], dim=1)
    for cut, ranks in ((3, 0), (5, 0), (1, 1), (3, 1)):
        parts = [[part.contiguous() for part in g.tensor_split([cut], dim=ranks)] for g in whole]
        total = torch.zeros_like(expected)
        for rank in range(2):
            here = tuple(part[rank] for part in parts)
            offset = rank * cut * (6 if ranks == 0 else 1)
            shards = tuple(Shard(i, 0, offset, p.numel(), 1000) for i, p in enumerate(here))
            total += LocalProbes(Layout("test", here, (0,) * 4, layers, shards))([p.view(-1) for p in here])
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_probes_tell_rows_and_columns_apart() -> None:
    for row, column in ((0, 0), (0, 5), (1, 3), (4, 6)):
        gradient = torch.zeros(6, 8)
        gradient[row, column] = 1
        expected = torch.zeros(2, 4, dtype=torch.float64)
        expected[row % 2, column % 4] = 1
        assert torch.equal(probes(gradient).view(2, 4), expected)


# Squares on their way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("owners", [2, 16])
def test_squares_of_a_gradient_with_many_owners(
    owners: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many operations for sixteen owners as for two."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: owners)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 1)
    monkeypatch.setattr(Bucket, "_reduce", lambda self, of_owner: torch.cat(of_owner[1]))
    parameter = torch.nn.Parameter(torch.zeros(32, 4, dtype=dtype))
    watched, length = Watched(weakref.ref(parameter)), 128 // owners
    slices = tuple(Slice(owner, owner * length, length, 3) for owner in range(owners))
    group: Any = object()
    destination = Destination(group, parameter, slices, kept_whole=False)
    partition = torch.zeros(length + 3)
    bucket = Bucket(group, torch.float32, lambda tensor: partition)
    gradient = torch.randn(128).to(dtype)
    casts = dtype != torch.float32
    first = operations(lambda: bucket.add(watched, destination, gradient))
    second = operations(lambda: bucket.add(watched, destination, gradient))
    assert first.total() == second.total() == 1 + 2 * casts
    bucket.add(watched, destination, gradient.float().square(), squared=True)
    bucket.flush()
    of_rank = gradient[length : 2 * length].float().square()
    torch.testing.assert_close(partition[3:], 3 * of_rank)
    assert partition[:3].eq(0).all()
