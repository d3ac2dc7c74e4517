"""Which blocks the GPU's programs work on, how often tables are made, and that steps do not depend on either."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from trustratio.optimizers import LAMB, LARS, create_optimizer
from trustratio.optimizers.kernels import triton_blocks, triton_kernels
from trustratio.optimizers.kernels.cpu_shards import Shards
from trustratio.optimizers.kernels.device_copies import DeviceCopies
from trustratio.optimizers.kernels.triton_blocks import ALIGNMENT, BLOCK, NOWHERE, BlockTable, residues
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from .kernel_runs import assert_close, flat_run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these on the device")

Tensor = torch.Tensor


# Tables -------------------------------------------------------------------------------------------------------------


def shards_of(lengths: Sequence[int], starts: Sequence[int], tensors: Sequence[int]) -> Shards:
    """A layer each; the element k of layer j has position 1000 j + k."""
    layers = torch.arange(len(lengths))
    columns = torch.tensor(tensors), torch.tensor(starts), torch.tensor(lengths), layers, 0 * layers, 1000 * layers
    return Shards(*columns)


@pytest.mark.parametrize("residue", [0, 5, 15, NOWHERE])
def test_blocks_cover_every_element_once(residue: int) -> None:
    lengths = [1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 31, 3 * BLOCK, 4 * BLOCK + 7, 33]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    table = BlockTable.of(shards_of(lengths, starts, [0] * len(lengths)), len(lengths), ["fp32"], [residue])
    touched = torch.zeros(sum(lengths), dtype=torch.int64)
    rows = torch.cat([launch.rows for launch in table.launches])
    for _, start, length, layer, position, _ in rows.tolist():
        assert 0 < length <= BLOCK
        assert starts[layer] <= start < start + length <= starts[layer] + lengths[layer]
        assert position - 1000 * layer == start - starts[layer]
        touched[start : start + length] += 1
    assert (touched == 1).all()
    # Sums lie in the order of the elements.
    by_place = rows[rows[:, 5].argsort()]
    assert by_place[:, 5].tolist() == list(range(table.count))
    assert by_place[:, 1].tolist() == sorted(by_place[:, 1].tolist())
    layers = torch.repeat_interleave(torch.arange(len(lengths)), table.ends.diff())
    assert torch.equal(by_place[:, 3], layers)
    for launch in table.launches:
        if launch.aligned:
            assert residue != NOWHERE
            assert ((launch.rows[:, 1] + residue) % ALIGNMENT == 0).all()
            assert (launch.rows[:, 2] % ALIGNMENT == 0).all()
    assert any(launch.aligned for launch in table.launches) == (residue != NOWHERE)


def test_what_fits_into_one_block_is_not_cut() -> None:
    table = BlockTable.of(shards_of([BLOCK, 40, 48, BLOCK], [0, 4096, 5008, 6001], [0] * 4), 4, ["fp32"], [0])
    assert [(launch.aligned, launch.rows[:, 3].tolist()) for launch in table.launches] == [
        (True, [0, 2]),
        (False, [1, 3]),
    ]


def test_a_launch_has_tensors_of_one_kind() -> None:
    shards = shards_of([64, 65, 66, 67, 80], [0] * 5, [3, 0, 1, 2, 4])
    table = BlockTable.of(shards, 5, ["b", "a", None, "b", "a"], [0] * 5)
    found = [(launch.types, launch.aligned, launch.rows[:, 0].tolist()) for launch in table.launches]
    assert found == [("a", True, [4]), ("a", False, [1]), ("b", True, [3]), ("b", False, [0])]
    assert table.ends.tolist() == [0, 1, 2, 3, 3, 4]  # none of the tensor without a kernel


def test_sums_lie_in_the_order_of_layers_whatever_the_order_of_shards() -> None:
    shards = shards_of([BLOCK + 16, 48, 32], [0, 0, 0], [0, 1, 2])
    shuffled = shards.only(torch.tensor([2, 0, 1]))
    table, expected = (BlockTable.of(of, 3, ["fp32"] * 3, [0] * 3) for of in (shuffled, shards))
    assert table.ends.tolist() == expected.ends.tolist() == [0, 2, 3, 4]
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(table.launches, expected.launches, strict=True))


def test_no_tensor_at_all() -> None:
    table = BlockTable.of(shards_of([64], [0], [0]), 1, [None], [0])
    assert (table.launches, table.ends.tolist(), table.count) == ([], [0, 0], 0)


def test_residues() -> None:
    sizes = torch.tensor([[4, 4, 4, 4], [2, 2, 2, 2], [4, 4, 4, 4]])
    addresses = torch.tensor([[640, 644, 644, 640], [640, 642, 640, 0], [1280, 1284, 1284, 1280]])
    common, known = residues(addresses, sizes, None)
    assert common.tolist() == [0, 1, NOWHERE, 0]
    # Where there is none, it is taken to lie where the last one lay.
    gone = addresses.clone()
    gone[1] = 0
    assert residues(gone, sizes, known)[0].tolist() == [0, 1, NOWHERE, 0]
    gone[:] = 0
    assert residues(gone, sizes, known)[0].tolist() == [0, 1, NOWHERE, 0]
    elsewhere = addresses.clone()
    elsewhere[1] = torch.tensor([642, 642, 642, 642])
    assert residues(elsewhere, sizes, known)[0].tolist() == [NOWHERE, 1, 1, NOWHERE]


# How often they are made --------------------------------------------------------------------------------------------


class Counted:
    """Counts tables that are made, and what is sent to the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.made = 0
        self.sent: list[Tensor] = []
        self.launches: list[Any] = []
        make, send = BlockTable.of, DeviceCopies.send

        def counting(*args: Any) -> BlockTable:
            self.made += 1
            return make(*args)

        def sending(copies: DeviceCopies, on_host: Tensor) -> Tensor:
            self.sent.append(on_host)
            return send(copies, on_host)

        monkeypatch.setattr(BlockTable, "of", counting)
        monkeypatch.setattr(DeviceCopies, "send", sending)

    def without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> Counted:
        class Launcher:
            def __getitem__(_, grid: Any) -> Callable[..., None]:
                return lambda *args, **constants: self.launches.append((grid, constants.get("ALIGNED")))

        monkeypatch.setattr(triton_kernels, "_KERNELS", dict.fromkeys(triton_kernels._KERNELS, Launcher()))
        monkeypatch.setattr(triton_kernels, "_fold", Launcher())
        return self


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def dropped(step: int, layer: int) -> bool:
    """Another set of layers at each step, as LayerDrop leaves out."""
    return bool((step * 37 + 11) >> (layer % 12) & 1) and layer != step % 12


def test_tables_are_made_once_whichever_layers_have_gradients(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted.without_kernels(monkeypatch)
    layers = [torch.nn.Parameter(torch.ones(24, 40 + index % 2)) for index in range(12)]
    gradients = [torch.ones_like(p) for p in layers]
    optimizer = LAMB(layers, implementation="triton")
    sets = set()
    for step in range(30):
        for index, p in enumerate(layers):
            p.grad = None if dropped(step, index) else gradients[index]
        sets.add(tuple(p.grad is None for p in layers))
        optimizer.step()
    assert len(sets) > 20
    assert counted.made == 1
    tables = [sent for sent in counted.sent if sent.shape[0] != 4]
    assert len(tables) == 3  # aligned blocks, others, and where layers end
    pointers = [sent for sent in counted.sent if sent.shape[0] == 4]
    assert {tuple(sent.shape) for sent in pointers} == {(4, 12)}  # weights, gradients and two kinds of state
    assert len(pointers) <= 30
    sent = len(counted.sent)
    optimizer.step()
    assert len(counted.sent) == sent  # nothing, where nothing changes


def test_one_launch_more_where_layers_are_not_of_whole_vectors(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted.without_kernels(monkeypatch)
    launches = []
    for width in (64, 63):
        layers = [torch.nn.Parameter(torch.ones(width, width)) for _ in range(50)] + [
            torch.nn.Parameter(torch.ones(32))
        ]
        optimizer = LAMB(layers, implementation="triton")
        for p in layers:
            p.grad = torch.ones_like(p)
        optimizer.step()
        counted.launches.clear()
        optimizer.step()
        launches.append(Counter(aligned for _, aligned in counted.launches))
    # None is the kernel that adds up the blocks' sums.
    assert launches == [{True: 2, None: 1}, {True: 2, False: 2, None: 1}]


def test_the_allocator_is_told_of_all_that_was_sent(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step, since each may be on another stream."""
    counted.without_kernels(monkeypatch)
    used: set[int] = set()
    monkeypatch.setattr(DeviceCopies, "used", lambda self, *tensors: used.update(_addresses(tensors)))
    groups = [{"params": [torch.nn.Parameter(torch.ones(40, 41))], "lr": 0.1 + 0.1 * index} for index in range(3)]
    optimizer = LAMB(groups, lr=0.1, implementation="triton")
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(40, 41)
    for _ in range(2):
        optimizer.step()
        assert used == _addresses(counted.sent)
        assert len(used) == 4  # pointers, blocks, where layers end, rates
        used.clear()


@pytest.mark.parametrize("implementation", ["triton", "cpu"])
def test_another_set_of_layers_costs_no_more_python(
    implementation: str, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than the same one again: nothing goes over all layers, or blocks, because the set has changed."""
    counted.without_kernels(monkeypatch)
    layers = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(100)]
    gradients = [torch.ones_like(p) for p in layers]
    optimizer = LAMB(layers, implementation=implementation)

    def calls(left_out: range) -> int:
        for index, p in enumerate(layers):
            p.grad = None if index in left_out else gradients[index]
        found = [0]
        sys.setprofile(lambda frame, event, arg: found.append(1) if event == "call" else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        return len(found)

    for left_out in (range(0), range(0), range(50, 60)):  # at the first layer without gradient, something is looked up
        calls(left_out)
    assert calls(range(3, 13)) < calls(range(0)) + len(layers)


@pytest.mark.parametrize("optimizer_class", [LAMB, LARS])
def test_steps_with_other_layers_each(optimizer_class: Any, counted: Counted) -> None:
    """Equal those of tensor operations: what takes no part is not touched."""
    results = []
    for implementation in ("triton", "eager"):
        generator = torch.Generator().manual_seed(0)
        shapes = [(5, 17), (17,), (32, 64), (3,), (70, 31)]
        layers = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = optimizer_class(layers, lr=0.05, weight_decay=0.1, implementation=implementation)
        for step in range(5):
            for index, p in enumerate(layers):
                gradient = torch.randn(p.shape, generator=generator)
                p.grad = None if step >> index % 3 & 1 else gradient
            optimizer.step()
        results.append(dict(enumerate(layers)))
        ratios = optimizer.trust_ratios()
    assert counted.made == 1
    assert_close(*results, 1e-6)
    assert len(ratios) == 5


def test_a_gradient_that_is_not_there_has_the_dtype_of_the_last_one(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here gradients are of bf16 beside weights in fp32, as a wrapper may leave them: no table for either."""
    counted.without_kernels(monkeypatch)
    layers = [torch.nn.Parameter(torch.ones(32)) for _ in range(2)]
    optimizer = LAMB(layers, implementation="triton")
    for step in range(8):
        for index, p in enumerate(layers):
            p.grad = torch.ones(32)
            p.grad = None if step and (step + index) % 2 else _in_bf16(p)
        optimizer.step()
    assert counted.made == 1


@pytest.mark.filterwarnings("ignore:implementation 'triton' serves")
def test_nor_is_there_one_for_a_gradient_that_no_kernel_takes(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted.without_kernels(monkeypatch)
    p, other = torch.nn.Parameter(torch.ones(32)), torch.nn.Parameter(torch.ones(32))
    p.grad_dtype = None
    optimizer = LAMB([p, other], implementation="triton")
    for gradient in (torch.ones(32), torch.ones(32, dtype=torch.float64), None, torch.ones(32)):
        p.grad, other.grad = gradient, torch.ones(32)
        optimizer.step()
    assert counted.made == 1


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _in_bf16(p: torch.nn.Parameter) -> Tensor:
    p.grad_dtype = None  # any
    return torch.ones(32, dtype=torch.bfloat16)


def two_tensors(implementation: str, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], dict[str, float]]:
    """One step of two flat tensors that are parts of layers which other ranks hold too."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(BLOCK + 50, generator=generator)) for _ in range(2)]
    layers = tuple(Layer(f"layer{index}", (BLOCK + 50, 1), index, part) for index, part in enumerate(parts))
    shards = tuple(Shard(index, 0, 0, BLOCK + 50) for index in range(2))
    group: Any = object()
    layout = Layout("test", tuple(parts), (0, 0), layers, shards, ((group, (0, 1)),))
    optimizer = LAMB(parts, lr=0.05, implementation=implementation)
    optimizer._plans.add(plan := Plan.of(optimizer, layout, parts))
    plan.agreement.steps_left = 0  # the other ranks are not there
    for step in range(2):
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient if step else torch.ones_like(part)
        optimizer.step()
    state = [optimizer.state[part][name] for part in parts for name in optimizer.element_state]
    return [*(part.detach() for part in parts), *state], optimizer.trust_ratios()


@pytest.mark.parametrize("gradients", [(None, 1.0), (1.0, None), (None, None)])
def test_a_shard_without_gradient_is_measured_where_layers_are_cut(
    gradients: Sequence[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layer may have a gradient elsewhere: here it has it from another rank, which sends its sums."""

    def add_the_other_ranks(numbers: Tensor, group: Any) -> None:
        numbers += 1.0

    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", add_the_other_ranks)
    monkeypatch.setattr("trustratio.optimizers.sharding.layout.reduction_device", lambda group, preferred: preferred)
    given = [None if number is None else torch.full((BLOCK + 50,), number) for number in gradients]
    found, expected = (two_tensors(implementation, given) for implementation in ("triton", "eager"))
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


# Where tensors lie --------------------------------------------------------------------------------------------------


def laid_out(optimizer: Any) -> tuple[BlockTable, dict[str, Tensor]]:
    (plan,) = optimizer._plans.values()
    (_, blocks), (_, pointers) = plan.cache["blocks", 0].made[0], plan.cache["pointers",].made[0]
    return blocks, pointers.rows


def assert_aligned(optimizer: Any, itemsize: int = 4) -> list[int]:
    """Every address of an aligned block is a multiple of 16 bytes; returns the aligned and the other elements."""
    blocks, pointers = laid_out(optimizer)
    elements = [0, 0]
    for launch in blocks.launches:
        elements[not launch.aligned] += int(launch.rows[:, 2].sum())
        if launch.aligned:
            for name, rows in pointers.items():
                size = {"gradients": {"fp32": 4, "bf16": 2, "fp16": 2}[launch.types.gradient]}.get(name, itemsize)
                addresses = rows[launch.rows[:, 0]] + size * launch.rows[:, 1]
                assert (addresses[rows[launch.rows[:, 0]] != 0] % 16 == 0).all(), name
    return elements


def views(sizes: Sequence[int], start: int, fill: float) -> list[Tensor]:
    """Neighbours in one buffer, from an odd place on."""
    buffer = torch.full((start + sum(sizes) + 64,), fill)
    buffer = buffer[-buffer.data_ptr() // 4 % ALIGNMENT :]  # as a GPU's memory begins
    return list(buffer[start : start + sum(sizes)].split(list(sizes)))


@pytest.mark.parametrize("gradients_start", [0, 3])
def test_parameters_that_are_views_at_odd_places(gradients_start: int) -> None:
    sizes = [BLOCK + 1, 2 * BLOCK, 5, 3 * BLOCK + 77]
    results = []
    for implementation in ("triton", "eager"):
        generator = torch.Generator().manual_seed(0)
        layers = [torch.nn.Parameter(view) for view in views(sizes, 3, 1.0)]
        optimizer = LAMB(layers, lr=0.05, adapt=True, implementation=implementation)
        for _ in range(2):
            for p, gradient in zip(layers, views(sizes, gradients_start, 0.0), strict=True):
                p.grad = gradient.copy_(torch.randn(gradient.shape, generator=generator))
            optimizer.step()
        results.append(dict(enumerate(layers)))
        if implementation == "triton":
            assert_aligned(optimizer)
    assert_close(*results, 1e-6)


def test_a_gradient_of_another_dtype_at_the_same_address() -> None:
    """As a view of the same buffer: there it lies behind another multiple of its elements."""
    size = 3 * BLOCK
    weights, momentum, gradient = (views([size], 4, 0.0)[0] for _ in range(3))
    p = torch.nn.Parameter(weights)
    p.grad_dtype = None  # any
    optimizer = LARS([p], lr=0.1, implementation="triton")
    optimizer.state[p]["momentum_buffer"] = momentum
    found = []
    for p.grad in (gradient, gradient.view(torch.bfloat16)[:size]):
        assert p.grad.data_ptr() == gradient.data_ptr()
        optimizer.step()
        found.append(assert_aligned(optimizer))
    assert found == [[size - ALIGNMENT, ALIGNMENT], [0, size]]


@pytest.mark.parametrize("storage", [{}, {"state_dtype": "bfloat16", "rounding_seed": 3}])
def test_layers_anywhere_in_a_flat_partition(storage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Most elements are in aligned blocks, and nothing depends on how blocks are cut."""
    lengths, gaps = [3 * BLOCK, 15, 33, 2 * BLOCK + 7, BLOCK, 16, 4 * BLOCK + 5], [3, 0, 1, 2, 1, 0, 9]
    found = flat_run("lamb", "triton", lengths, gaps, **storage)
    monkeypatch.setattr(triton_kernels, "residues", lambda *args: (torch.tensor([NOWHERE]), args[0]))
    expected = flat_run("lamb", "triton", lengths, gaps, **storage)
    for layer in found:  # all sums are of fp64, so that their order shows in no weight, or hardly
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-6, atol=1e-9)


def test_a_flat_partition_is_mostly_aligned() -> None:
    lengths = [3 * BLOCK, 15, 2 * BLOCK + 7, 4 * BLOCK + 5]
    flat = torch.nn.Parameter(torch.ones(sum(lengths) + 3))
    starts = torch.tensor([3, *lengths[:-1]]).cumsum(0).tolist()
    layers = tuple(Layer(f"layer{index}", (length,), 0, flat) for index, length in enumerate(lengths))
    shards = tuple(Shard(index, starts[index], 0, length) for index, length in enumerate(lengths))
    layout = Layout("test", (flat,), (0,), layers, shards, placed=True)
    optimizer = create_optimizer("lars", [flat], implementation="triton", lr=0.1)
    optimizer._plans.add(Plan.of(optimizer, layout, [flat]))
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    aligned, others = assert_aligned(optimizer)
    assert aligned + others == sum(lengths)
    assert others <= 15 + 3 * 2 * (ALIGNMENT - 1)


def test_a_table_that_is_no_longer_asked_for_is_given_up() -> None:
    """One for each of the last two ways in which tensors lie or gradients come."""
    recent = [torch.nn.Parameter(torch.ones(64)) for _ in range(3)]
    optimizer = LARS(recent, implementation="triton", lr=0.1)
    watched = []
    for start in range(4):
        for p, gradient in zip(recent, views([64] * 3, start, 1.0), strict=True):
            p.grad = gradient
        optimizer.step()
        watched.append(weakref.ref(laid_out(optimizer)[0]))
    (plan,) = optimizer._plans.values()
    assert len(plan.cache["blocks", 0].made) <= 2
    assert triton_blocks.BLOCK == triton_kernels.BLOCK
