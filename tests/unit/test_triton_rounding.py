"""Rounding in Triton, by the interpreter: the random bits, the rounding itself, and steps that keep 16 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from trustratio.optimizers import create_optimizer
from trustratio.optimizers.formulas.rounding import Rounding, rounded_stochastically
from trustratio.optimizers.kernels import triton_kernels, triton_rounding
from trustratio.optimizers.kernels.interface import GroupOperands, Operands
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from .kernel_runs import assert_close, flat_run
from .test_generic import backward, make_gradients, make_parameters
from .test_triton_kernels import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
    pytest.mark.filterwarnings("ignore:.*invalid value encountered.*"),
    pytest.mark.filterwarnings("ignore:.*weights that have a gradient did not move.*"),
    pytest.mark.filterwarnings("ignore:.*took a step without the sample of the curvature.*"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these on the device"),
]

Tensor = torch.Tensor
BLOCK = triton_kernels.BLOCK
MASK = (1 << 64) - 1
BF16_NAN = 0x7FC0


# The generator and the rounding -------------------------------------------------------------------------------------


@triton.jit
def _bits_of(rows, keys, gammas, layer, wanted, found, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, COUNT)
    bits = triton_rounding.random_bits(rows, keys, gammas, layer, offsets, wanted)
    tl.store(found + tl.program_id(0) * COUNT + offsets, bits.to(tl.int64))


@triton.jit
def _rounded(x, bits, found, FIELD: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, COUNT)
    numbers = tl.load(x + offsets)
    if FIELD < 4:
        rounded = triton_rounding.stochastic(numbers, tl.load(bits + offsets).to(tl.uint64), FIELD)
    else:
        rounded = triton_rounding.to_nearest(numbers)
    tl.store(found + offsets, rounded)  # the interpreter converts subnormal numbers wrongly


def signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def word(key: int, gamma: int, position: int) -> int:
    """The first 64 bits of an element, by whole numbers of Python's."""
    z = (key + (position + 1) * gamma) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize(
    ("key", "gamma"),
    [(0, 0x9E3779B97F4A7C15), (MASK, MASK), (0x647FC4F49ED9E3BD, 0xD1B54A32D192ED03), (1 << 63, 0x2545F4914F6CDD1D)],
)
def test_random_bits_are_split_mix(key: int, gamma: int) -> None:
    positions = [0, 1, 12345, (1 << 31) - 3, (1 << 32) - 3, (1 << 33) + 77, 1 << 62]
    keys, gammas = (torch.tensor([7, signed(number)]) for number in (key, gamma))
    rows = torch.tensor([[0, 0, 0, 0, position, 0] for position in positions])
    found = torch.empty(len(positions), 8, dtype=torch.int64)
    _bits_of[(len(positions),)](rows, keys, gammas, 1, 1, found, COUNT=8)
    expected = [[signed(word(key, gamma, first + i)) for i in range(8)] for first in positions]
    assert found.tolist() == expected


def test_the_first_numbers_are_the_published_ones() -> None:
    """Of SplitMix64 with the seed 1234567 (Vigna's splitmix64.c), whose counter is raised before the first number."""
    rows, keys, gammas = (
        torch.zeros(1, 6, dtype=torch.int64),
        torch.tensor([1234567]),
        torch.tensor([0x9E3779B97F4A7C15 - (1 << 64)]),
    )
    found = torch.empty(2, dtype=torch.int64)
    _bits_of[(1,)](rows, keys, gammas, 0, 1, found, COUNT=2)
    assert [number & MASK for number in found.tolist()] == [6457827717110365317, 3203168211198807973]


def test_no_bits_are_made_where_none_are_wanted() -> None:
    found = torch.ones(8, dtype=torch.int64)
    _bits_of[(1,)](torch.zeros(1, 6, dtype=torch.int64), torch.ones(1), torch.ones(1), 0, 0, found, COUNT=8)
    assert not found.any()


SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, 1.00390625, 1.005859375, 1.01171875, 1e-45, -1e-40, 3.3895313892515355e38),
    *(torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, math.inf, -math.inf, math.nan),
]


def numbers() -> Tensor:
    """Numbers of all sizes, then numbers that bf16 has, then special ones and NaN with all kinds of bits."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(-(1 << 31), 1 << 31, (4096,), generator=generator).to(torch.int32)
    some[2000:2048] &= -0x10000
    some[2048 : 2048 + len(SPECIAL)] = torch.tensor(SPECIAL).view(torch.int32)
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7FC00000]).to(torch.int32)
    some[3000 : 3000 + len(nan)] = nan
    return some.view(torch.float32)


def rounded(x: Tensor, bits: Tensor, field: int) -> Tensor:
    """The bits of the results in bf16."""
    found = torch.empty_like(x)
    _rounded[(1,)](x, bits, found, FIELD=field, COUNT=len(x))
    assert not (found.view(torch.int32) & 0xFFFF).any()
    return (found.view(torch.int32) >> 16).to(torch.int16)


@pytest.mark.parametrize("field", range(4))
def test_stochastic_rounding_is_that_of_tensor_operations(field: int) -> None:
    x = numbers()
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, x.shape, generator=torch.Generator().manual_seed(field))
    bits[:64:2], bits[1:64:2] = -1, 0
    expected = rounded_stochastically(x, (bits >> 16 * field) & 0xFFFF).to(torch.bfloat16).view(torch.int16)
    expected[x.isnan()] = BF16_NAN  # torch's own conversion leaves the bits of NaN to the processor
    found = rounded(x, bits, field)
    assert torch.equal(found, expected)
    exact = x.to(torch.bfloat16).to(torch.float32) == x
    assert torch.equal(found.view(torch.bfloat16)[exact].float(), x[exact])


def test_the_mean_of_stochastic_rounding_is_the_number() -> None:
    x = torch.full((1 << 16,), 1 + 2**-8 + 2**-13)
    every = torch.arange(1 << 16) << 16
    assert rounded(x, every, 1).view(torch.bfloat16).double().mean().item() == x[0].item()


def test_rounding_to_nearest_is_that_of_torch() -> None:
    x = numbers()
    expected = torch.where(x.isnan(), BF16_NAN, x.to(torch.bfloat16).view(torch.int16))
    assert torch.equal(rounded(x, torch.zeros_like(x, dtype=torch.int64), 4), expected.to(torch.int16))


# Steps --------------------------------------------------------------------------------------------------------------

KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "state": (torch.float32, {"state_dtype": "bfloat16"}),
    "all by chance": (torch.bfloat16, {"state_dtype": "bfloat16", "master": "stochastic", "rounding_seed": 3}),
    "all, weights with a rest": (torch.bfloat16, {"state_dtype": "bfloat16", "master": "kahan"}),
}
OTHERS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.bfloat16, {"master": "stochastic"}),
    (torch.bfloat16, {"master": "kahan"}),
    (torch.float16, {"state_dtype": "bfloat16"}),
    (torch.float32, {"state_dtype": "bfloat16", "master": "kahan"}),
]
SHAPES: dict[str, tuple[int, ...]] = {"blocks": (BLOCK + 1, 2), "odd": (3, 11), "bias": (17,), "scalar": ()}


def run(name: str, implementation: str, dtype: torch.dtype, steps: int = 2, **options: Any) -> Any:
    parameters = make_parameters(dtype, SHAPES)
    given = {"lr": 0.05, "weight_decay": 0.1, "implementation": implementation, **options}
    optimizer = create_optimizer(name, list(parameters.items()), **given)
    for step in range(steps):
        gradients = make_gradients(step, parameters)
        if step == 1:
            gradients["blocks"][:, : BLOCK // 2] = (
                0.0  # of all groups of samples: a block that has state but no gradient
            )
            del gradients["bias"]
        optimizer.zero_grad()
        backward(parameters, gradients)
        optimizer.step()
    return parameters, optimizer


def differing(found: Tensor, expected: Tensor) -> int:
    """How many numbers differ by more than fp32 rounds; of those in bf16, none by more than a step of a large one."""
    a, b = found.detach().double(), expected.detach().double()
    distance = (a - b).abs()
    if found.dtype == torch.bfloat16:
        assert distance.max() <= 2**-7 * b.abs().max()
    return int((distance > 1e-6 * b.abs().clamp(min=b.abs().mean())).sum())


def assert_same_but_for_few(found: Any, expected: Any, names: Sequence[str] = ()) -> None:
    (parameters, optimizer), (wanted, reference) = found, expected
    for name in ("", *names):
        pairs = [
            (p, wanted[layer]) if not name else (optimizer.state[p][name], reference.state[wanted[layer]][name])
            for layer, p in parameters.items()
        ]
        assert sum(differing(*pair) for pair in pairs) <= 1e-3 * sum(a.numel() for a, _ in pairs), name or "weights"


def compare(name: str, dtype: torch.dtype, **options: Any) -> None:
    found, expected = (run(name, how, dtype, **options) for how in ("triton", "eager"))
    state_dtype = torch.bfloat16 if "state_dtype" in options else torch.float32
    names = [*found[1].element_state]
    for state in (found[1].state[p] for p in found[0].values()):
        assert all(state[name].dtype is state_dtype for name in names)
        assert ("compensation" in state) == (dtype is torch.bfloat16 and options.get("master") == "kahan")
    assert_same_but_for_few(found, expected, names)
    assert found[1].trust_ratios() == pytest.approx(expected[1].trust_ratios(), rel=1e-5)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_steps_equal_tensor_operations(name: str, options: dict[str, Any], kept: str) -> None:
    dtype, storage = KEPT[kept]
    compare(name, dtype, **options, **storage)


@pytest.mark.parametrize(("dtype", "storage"), OTHERS)
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_other_dtypes_and_masters(name: str, dtype: torch.dtype, storage: dict[str, Any]) -> None:
    compare(name, dtype, **storage)


def test_weights_that_are_rounded_to_nearest_beside_state_in_bf16() -> None:
    """The interpreter cuts off bits of the weights, where the device rounds them."""
    found, expected = (run("lamb", how, torch.bfloat16, 1, state_dtype="bfloat16") for how in ("triton", "eager"))
    for layer, p in found[0].items():
        for name in found[1].element_state:
            assert differing(found[1].state[p][name], expected[1].state[expected[0][layer]][name]) <= 4
    assert_close(found[0], expected[0], 2**-6)


ELEMENTWISE = {"adapt": False, "weight_decay": 0.1, "lr": 0.05}  # ratios are 1, so that no sum matters


def block_of(shape: tuple[int, int], rows: slice, columns: slice) -> Shard:
    """A block of a layer as the only shard of a tensor of its own."""
    positions = torch.arange(shape[0] * shape[1]).view(shape)[rows, columns].flatten()
    first, last = positions[[0, -1]].tolist()
    return Shard(0, 0, first, positions.numel(), last - first + 1)


def stepped(name: str, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype, **options: Any) -> Any:
    """Two steps of a block of a layer: the weights, all state, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    shard = block_of(shape, rows, columns)
    local = torch.nn.Parameter(torch.randn(shape, generator=generator)[rows, columns].to(dtype).contiguous())
    layout = Layout("test", (local,), (0,), (Layer("layer", shape, 0, local),), (shard,), placed=True)
    optimizer = create_optimizer(name, [local], **{**ELEMENTWISE, "implementation": "triton", **options})
    optimizer._plans.add(Plan.of(optimizer, layout, [local]))
    for _ in range(2):
        local.grad = torch.randn(shape, generator=generator)[rows, columns].to(dtype).contiguous()
        optimizer.step()
    state = {key: value for key, value in optimizer.state[local].items() if value.shape == local.shape}
    return {"weights": local.detach(), **state}, optimizer


@pytest.mark.parametrize("master", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["lars", "lamb", "adabelief"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(1, 15), slice(0, 301)),
        (slice(0, 16), slice(37, 137)),
        (slice(3, 9), slice(150, 301)),
        (slice(0, 16), slice(5, 8)),
    ],
)
def test_a_part_of_a_layer_has_the_bits_of_the_whole(name: str, rows: slice, columns: slice, master: str) -> None:
    """Runs begin and end anywhere, in memory and in the layer."""
    options = {"dtype": torch.bfloat16, "state_dtype": "bfloat16", "master": master}
    whole, _ = stepped(name, (16, 301), slice(None), slice(None), **options)
    part, optimizer = stepped(name, (16, 301), rows, columns, **options)
    assert ("blocks", 0) in next(iter(optimizer._plans.values())).cache  # compiled code has computed it
    for key, value in part.items():
        assert torch.equal(value, whole[key][rows, columns]), key


def test_positions_of_more_than_32_bits() -> None:
    """A row of a layer far behind, by Triton and by tensor operations."""
    results = []
    for implementation in ("triton", "eager"):
        generator = torch.Generator().manual_seed(0)
        local = torch.nn.Parameter(torch.randn(2 * BLOCK + 3, generator=generator))
        layer, shard = Layer("layer", (1 << 20, 1 << 20), 0, local), Shard(0, 0, (1 << 33) + 5, local.numel())
        layout = Layout("test", (local,), (0,), (layer,), (shard,), placed=True)
        optimizer = create_optimizer(
            "lamb", [local], implementation=implementation, state_dtype="bfloat16", adapt=False
        )
        optimizer._plans.add(Plan.of(optimizer, layout, [local]))
        local.grad = torch.randn(local.shape, generator=generator)
        optimizer.step()
        results.append(optimizer.state[local]["exp_avg"])
    assert differing(*results) <= 4


@pytest.mark.parametrize("storage", [KEPT[kept] for kept in KEPT])
@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "adabelief", "fastadabelief", "stableadamw"])
def test_odd_starts_and_layers_that_do_not_change(name: str, storage: tuple[torch.dtype, dict[str, Any]]) -> None:
    dtype, options = storage
    lengths, gaps = [1, 15, 33, BLOCK, BLOCK + 7, 16, 5], [3, 0, 1, 2, 1, 0, 9]
    found, expected = (flat_run(name, how, lengths, gaps, dtype, **options) for how in ("triton", "eager"))
    assert sum(differing(found[layer], expected[layer]) for layer in found) <= 4


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", ["lars", "lamb", "adabelief"])
def test_gradients_that_are_not_finite(name: str, kept: str) -> None:
    """Each element has what tensor operations make of it; NaN is the one of bf16 without further bits."""
    dtype, storage = KEPT[kept]
    results = []
    for implementation in ("triton", "eager"):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 64).to(dtype))
        optimizer = create_optimizer(name, [p], implementation=implementation, **ELEMENTWISE, **storage)
        p.grad = torch.linspace(1, 2, 64).to(dtype)
        p.grad[3], p.grad[4], p.grad[5] = torch.nan, torch.inf, -torch.inf
        optimizer.step()
        results.append({"weights": p.detach(), **{s: optimizer.state[p][s] for s in optimizer.element_state}})
    for key, value in results[0].items():
        assert torch.equal(value.isnan(), results[1][key].isnan()), key
        assert torch.equal(value.isinf(), results[1][key].isinf()), key
        assert value.isnan().any() or key == "weights"
        if value.dtype == torch.bfloat16:
            assert (value.view(torch.int16)[value.isnan()] == BF16_NAN).all(), key


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("weight", "state", "compensation", "rounding", "served"),
    [
        (FP32, BF16, None, (True, None), True),
        (BF16, BF16, None, (True, "stochastic"), True),
        (BF16, BF16, BF16, (True, "kahan"), True),
        (BF16, FP32, BF16, (False, "kahan"), True),
        (FP32, BF16, None, None, False),  # nobody says how it is rounded
        (FP32, FP32, None, (True, None), False),
        (FP32, BF16, None, (False, None), False),
        (BF16, BF16, FP32, (True, "kahan"), False),
        (torch.float64, BF16, None, (True, None), False),
    ],
)
def test_what_is_served(
    weight: torch.dtype, state: torch.dtype, compensation: torch.dtype | None, rounding: Any, served: bool
) -> None:
    """The second of two tensors of a group; the first one keeps what it should, and has no compensation."""
    given = None
    if rounding is not None:
        given = Rounding(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), *rounding)
    usual = BF16 if rounding is not None and rounding[0] else FP32
    weights = [torch.zeros(4), torch.zeros(4, dtype=weight)]
    layers = tuple(Layer(f"layer{index}", (4,), index) for index in range(2))
    layout = Layout("test", tuple(weights), (0, 0), layers, (Shard(0, 0, 0, 4), Shard(1, 0, 0, 4)))
    kept = {"exp_avg": [torch.zeros(4, dtype=usual), torch.zeros(4, dtype=state)]}
    if compensation is not None:
        kept["compensation"] = [torch.zeros(0), torch.zeros(4, dtype=compensation)]
    groups: Any = {0: GroupOperands({}, range(2), [0, 1], None, given)}  # type: ignore[arg-type]
    operands = Operands(layout, weights, [None, None], kept, groups)
    assert triton_kernels.KERNELS.serves(operands) == [True, served]
