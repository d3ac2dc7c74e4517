"""Sweeps on the CPU over state and weights that are kept with 16 bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, create_optimizer
from trustratio.optimizers.formulas.layer_table import LayerTable
from trustratio.optimizers.formulas.rounding import Rounding
from trustratio.optimizers.formulas.updates import MomentumUpdate
from trustratio.optimizers.kernels import choice, cpu
from trustratio.optimizers.kernels.interface import GroupOperands, Operands
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard

from .kernel_runs import BLOCK, LR, Tensor, needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.usefixtures("many_threads"),
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*", "ignore:.*did not move in this step.*"),
]

WORD = 1 << 64
COLUMNS = 200
KEY, GAMMA = 0xFEDCBA9876543210, 0xD3833E804F4C574B


@pytest.fixture(params=[0, 1, 2])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of instructions."""
    if request.param > cpu._best_level():
        pytest.skip(f"this processor cannot execute the instructions of level {request.param}")
    monkeypatch.setattr(cpu, "_best_level", lambda: request.param)
    return int(request.param)


def random_word(position: int, key: int = KEY, gamma: int = GAMMA) -> int:
    """SplitMix64 in whole numbers."""
    z = (key + (position + 1) * gamma) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def rounded(bits: int, added: int) -> int:
    """The 16 bits that are kept of an fp32 number's 32."""
    is_nan = bits & 0x7FFFFFFF > 0x7F800000
    return 0x7FC0 if is_nan else ((bits + added) % (1 << 32)) >> 16


def stochastically(bits: Sequence[int], first: int, field: int) -> list[int]:
    return [rounded(b, random_word(first + i) >> 16 * field & 0xFFFF) for i, b in enumerate(bits)]


def to_nearest(bits: int) -> int:
    return rounded(bits, 0x7FFF + (bits >> 16 & 1))


def signed(number: int, size: int) -> int:
    return number - (1 << size) if number >> (size - 1) else number


def fp32_of(bits: Sequence[int]) -> Tensor:
    return torch.tensor([signed(b, 32) for b in bits], dtype=torch.int32).view(torch.float32)


def bits_of(numbers: Tensor) -> list[int]:
    size = 8 * numbers.element_size()
    kind = torch.int32 if size == 32 else torch.int16
    return [b % (1 << size) for b in numbers.detach().reshape(-1).contiguous().view(kind).tolist()]


def some_bits(count: int) -> list[int]:
    """Of fp32 numbers of all kinds, those that are not finite and the smallest and largest among them."""
    generator = random.Random(1)
    special = [0, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF]
    special += [1, 0x80000001, 0x007FFFFF, 0x3F7FFFFF, 0x3F800000, 0x3F808000, 0x3F818000]
    return (special + [generator.getrandbits(32) for _ in range(count)])[:count]


# The numbers themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 5, (1 << 32) - 3, (1 << 40) + 7])
@pytest.mark.parametrize("count", [1, 3, 16, 37])
def test_random_bits_are_those_of_split_mix(level: int, position: int, count: int) -> None:
    found = torch.zeros(count + 1, dtype=torch.int64)
    cpu._compiled().trustratio_random_words(KEY, GAMMA, position, found.data_ptr(), count, level)
    assert [word % WORD for word in found.tolist()] == [*(random_word(position + i) for i in range(count)), 0]


def momentum_step(
    weights: Tensor, gradient: Tensor, kept: dict[str, Tensor], shards: Sequence[Shard], **rounding: Any
) -> None:
    """One sweep v ← 0.5·v + g, w ← w - v over a layer of rows of `COLUMNS` of which the shards are here."""
    rows = -(-max(shard.end for shard in shards) // COLUMNS)
    layout = Layout("test", (weights,), (0,), (Layer("layer", (rows, COLUMNS), 0),), tuple(shards))
    ones = torch.ones(1, dtype=torch.float64)
    table = LayerTable(list(layout.layers), torch.tensor([True]), {})
    table.receive("g", ones, ones)
    numbers = (torch.tensor([signed(number, 64)]) for number in (KEY, GAMMA))
    group = GroupOperands({}, range(1), [0], table, Rounding(*numbers, **rounding))
    operands = Operands(layout, [weights], [gradient], {name: [s] for name, s in kept.items()}, {0: group})
    assert cpu.KERNELS.serves(operands) == [True]
    momentum = 0.5 if "momentum_buffer" in kept else 0.0
    sweeps = cpu.KERNELS.open(operands, [True], {})
    assert sweeps.apply(0, MomentumUpdate(momentum, 0.0, ones, ones))


LENGTHS = [1, 15, 16, 33, 2 * BLOCK + 37]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", [0, (1 << 32) + 7])
def test_state_is_rounded_by_the_bits_of_its_elements(level: int, length: int, offset: int) -> None:
    """Of v = g; the step is made of what is kept."""
    start = 3
    bits = some_bits(length)
    gradient = torch.cat([torch.full((start,), torch.nan), fp32_of(bits)])
    weights, state = torch.zeros(len(gradient)), torch.zeros(len(gradient), dtype=torch.bfloat16)
    momentum_step(
        weights, gradient, {"momentum_buffer": state}, [Shard(0, start, offset, length)], state=True, master=None
    )
    expected = stochastically(bits, offset, 0)
    assert bits_of(state) == [0] * start + expected
    kept = -fp32_of([b << 16 for b in expected])
    torch.testing.assert_close(weights[start:], kept, rtol=0, atol=0, equal_nan=True)
    assert (weights[:start] == 0).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_weights_are_rounded_by_the_bits_of_their_elements(
    level: int, length: int, gradient_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(length, generator=generator).bfloat16()
    gradient = (torch.randn(length, generator=generator) / 100).to(gradient_dtype)
    gradient[length // 2] = torch.nan
    before = weights.float()
    momentum_step(weights, gradient, {}, [Shard(0, 0, 11, length)], state=False, master="stochastic")
    assert bits_of(weights) == stochastically(bits_of(before - gradient.float()), 11, 3)


@pytest.mark.parametrize("length", LENGTHS)
def test_weights_of_two_numbers(level: int, length: int) -> None:
    """Two steps, the second of which finds the rest that the first one has left."""
    generator = torch.Generator().manual_seed(3)
    weights, expected = (torch.randn(length, generator=generator).bfloat16() for _ in range(2))
    expected.copy_(weights)
    rest = torch.zeros(length, dtype=torch.bfloat16)
    expected_rest = [0] * length
    for _ in range(2):
        gradient = torch.randn(length, generator=generator) / 100
        momentum_step(weights, gradient, {"compensation": rest}, [Shard(0, 0, 0, length)], state=False, master="kahan")
        total = expected.float() + fp32_of([b << 16 for b in expected_rest]) - gradient
        near = fp32_of([to_nearest(b) << 16 for b in bits_of(total)])
        total = near + fp32_of([b << 16 for b in stochastically(bits_of(total - near), 0, 3)])
        kept = [to_nearest(b) for b in bits_of(total)]
        expected_rest = [b >> 16 for b in bits_of(total - fp32_of([b << 16 for b in kept]))]
        expected = fp32_of([b << 16 for b in kept]).bfloat16()
        assert bits_of(weights) == kept
        assert bits_of(rest) == expected_rest
    assert any(expected_rest)


def test_fp32_weights_are_never_rounded(level: int) -> None:
    weights, gradient = torch.ones(100), torch.full((100,), 1e-5)
    for master in ("stochastic", "kahan"):
        momentum_step(
            weights, gradient, {"compensation": torch.zeros(0)}, [Shard(0, 0, 0, 100)], state=False, master=master
        )
    assert (weights == torch.tensor(1.0) - 1e-5 - 1e-5).all()


# However a layer is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", [None, "stochastic", "kahan"])
def test_parts_have_the_bits_of_the_whole(master: str | None) -> None:
    """Runs at odd positions, more than one, and a block of columns, of which each row is a run."""
    rows = 20
    generator = torch.Generator().manual_seed(4)
    gradient = torch.randn(rows, COLUMNS, generator=generator)
    weights = torch.randn(rows, COLUMNS, generator=generator).bfloat16()

    def stepped(view: Any, *shards: Shard) -> list[Tensor]:
        w, g = view(weights).clone(), view(gradient).contiguous()
        state = {"momentum_buffer": torch.zeros_like(w)}
        if master == "kahan":
            state["compensation"] = torch.zeros_like(w)
        for _ in range(2):
            momentum_step(w, g, state, shards, state=True, master=master)
        return [w, *state.values()]

    size = rows * COLUMNS
    whole = stepped(torch.flatten, Shard(0, 0, 0, size))
    cuts = [0, 1, 1234, 1251, size]
    in_runs = stepped(torch.flatten, *(Shard(0, at, at, end - at) for at, end in pairwise(cuts)))
    one_run = stepped(lambda t: t.flatten()[1251:], Shard(0, 0, 1251, size - 1251))
    block = stepped(lambda t: t[:, 33:110], Shard(0, 0, 33, rows * 77, (rows - 1) * COLUMNS + 77))
    column = stepped(lambda t: t[:, 99:100], Shard(0, 0, 99, rows, (rows - 1) * COLUMNS + 1))
    for index, expected in enumerate(whole):
        assert torch.equal(in_runs[index], expected)
        assert torch.equal(one_run[index], expected[1251:])
        assert torch.equal(block[index], expected.view(rows, COLUMNS)[:, 33:110])
        assert torch.equal(column[index], expected.view(rows, COLUMNS)[:, 99:100])


def operands_of(weights: Tensor, state: dict[str, Tensor], shard: Shard, rounding: Rounding | None) -> Operands:
    layout = Layout("test", (weights,), (0,), (Layer("layer", (20, COLUMNS), 0),), (shard,))
    table = LayerTable(list(layout.layers), torch.tensor([True]), {})
    group = GroupOperands({}, range(1), [0], table, rounding)
    return Operands(layout, [weights], [None], {name: [s] for name, s in state.items()}, {0: group})


def test_what_is_served() -> None:
    numbers = torch.zeros(1, dtype=torch.int64)
    half, single = (torch.zeros(20, 77, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    nothing = torch.zeros(0)
    block = Shard(0, 0, 33, 20 * 77, 19 * COLUMNS + 77)

    def served(w: Tensor, m: Tensor, rest: Tensor | None, shard: Shard = block, *how: Any) -> bool:
        state = {"exp_avg": m} if rest is None else {"exp_avg": m, "compensation": rest}
        return cpu.KERNELS.serves(operands_of(w, state, shard, Rounding(numbers, numbers, *how) if how else None))[0]

    assert served(single, half, None, block, True)
    assert served(half, half, None, block, True, "stochastic")
    assert served(half, single, half, block, False, "kahan")
    assert served(single, single, nothing, block, False, "kahan")
    assert served(half, single, nothing)
    assert not served(single, half, None)  # of another file, with state to be converted
    assert not served(single, single, None, block, True)
    assert not served(half, single, single, block, False, "kahan")
    assert not served(half, single, nothing, block, False, "kahan")


# Against tensor operations --------------------------------------------------------------------------------------------

KINDS = [
    pytest.param("lars", {"nesterov": True}, id="momentum"),
    pytest.param("vrlars", {}, id="momentum-gsnr"),
    pytest.param("lamb", {}, id="adam"),
    pytest.param("lans", {}, id="lans"),
    pytest.param("stableadamw", {"update_clip": 0.9, "decay_form": "unclipped"}, id="adam-clip"),
    pytest.param("lans", {"update_clip": 0.9}, id="lans-clip"),
    pytest.param("vrlamb", {"update_clip": 0.9}, id="adam-gsnr-clip"),
    pytest.param("vrlamb", {}, id="adam-gsnr"),
    pytest.param("vrlamb", {"second_moment": "mean"}, id="adam-gsnr-mean"),
    pytest.param("adabelief", {"rectify": False, "adapt": True, "betas": (0.8, 0.99)}, id="belief"),
    pytest.param(
        "adabelief", {"rectify": False, "amsgrad": True, "adapt": True, "betas": (0.8, 0.99)}, id="belief-max"
    ),
    pytest.param("fastadabelief", {"running_maximum": False}, id="belief-no-root"),
    pytest.param("fastadabelief", {"adapt": True}, id="belief-max-no-root"),
]
STORAGE = [
    pytest.param(torch.float32, {"state_dtype": "bfloat16"}, id="state"),
    pytest.param(torch.float16, {"state_dtype": "bfloat16"}, id="state-of-fp16"),
    pytest.param(torch.bfloat16, {"state_dtype": "bfloat16"}, id="state-nearest"),
    pytest.param(torch.bfloat16, {"state_dtype": "bfloat16", "master": "stochastic"}, id="state-stochastic"),
    pytest.param(torch.bfloat16, {"state_dtype": "bfloat16", "master": "kahan"}, id="state-kahan"),
    pytest.param(torch.bfloat16, {"master": "stochastic"}, id="stochastic"),
    pytest.param(torch.bfloat16, {"master": "kahan"}, id="kahan"),
]
LENGTHS_OF_LAYERS = (1, 17, 700, 2 * BLOCK + 37, 300, 40)
HALF_ZERO, NO_GRADIENT, ZERO_GRADIENT = 3, 4, 5


def trained(name: str, implementation: str, dtype: torch.dtype = torch.float32, steps: int = 2, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(6)
    ps = [torch.nn.Parameter(torch.randn(n, 1, generator=generator).to(dtype)) for n in LENGTHS_OF_LAYERS]
    named = [(f"layer{index}", p) for index, p in enumerate(ps)]
    options = {"lr": LR, "weight_decay": 0.1, **options}
    optimizer = create_optimizer(name, named, implementation=implementation, **options)
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(2 if optimizer.group_statistics else 1):
            gradients = [torch.randn(p.shape, generator=generator).to(dtype) for p in ps]
            gradients[ZERO_GRADIENT].zero_()
            gradients[HALF_ZERO][: (2 - step) * BLOCK] = 0  # whole blocks, fewer each time
            given = [
                (p * g).sum() for index, (p, g) in enumerate(zip(ps, gradients, strict=True)) if index != NO_GRADIENT
            ]
            torch.stack(given).sum().backward()
        optimizer.step()
    return ps, optimizer


def contents(run: Any) -> list[dict[str, Tensor]]:
    """Of each layer: weights and element-wise state."""
    ps, optimizer = run
    names = (*optimizer.element_state, "compensation")
    return [
        {"w": p.detach(), **{name: s for name in names if (s := optimizer.state[p].get(name)) is not None}} for p in ps
    ]


def assert_alike(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """But for single elements in which fp32's last bit has moved a number over the edge to the next one of bf16."""
    differing = total = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        if "compensation" in ours:
            ours, theirs = (
                {**one, "w": one["w"].float() + one.pop("compensation")} for one in (dict(ours), dict(theirs))
            )
        for name, tensor in ours.items():
            other = theirs[name]
            assert tensor.dtype == other.dtype, name
            differing += int(((tensor - other).abs() > 1e-5 * other.abs() + 1e-7).sum())
            total += tensor.numel()
            torch.testing.assert_close(tensor.float(), other.float(), rtol=0.02, atol=1e-3)
    assert differing <= 1e-3 * total


@pytest.mark.parametrize(
    ("name", "options", "dtype", "storage"),
    [
        pytest.param(*kind.values, *storage.values, id=f"{kind.id}-{storage.id}")
        for kind in KINDS
        for storage in STORAGE
        if storage.id in ("state", "state-kahan") or kind.id in ("momentum", "adam")
    ],
)
def test_sweeps_equal_tensor_operations(
    name: str, options: dict[str, Any], dtype: torch.dtype, storage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    expected = trained(name, "eager", dtype, **storage, **options)
    monkeypatch.setattr(
        "trustratio.optimizers.kernels.eager.cut_into_chunks", lambda layout: pytest.fail("tensor operations")
    )
    found = trained(name, "cpu", dtype, **storage, **options)
    assert_alike(contents(found), contents(expected))
    assert found[1].trust_ratios() == pytest.approx(expected[1].trust_ratios(), rel=1e-3)


def bits_equal(one: Any, other: Any) -> None:
    for index, (ours, theirs) in enumerate(zip(contents(one), contents(other), strict=True)):
        for name, tensor in ours.items():
            assert torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num()), (index, name)
            assert torch.equal(tensor.isnan(), theirs[name].isnan()), (index, name)


@pytest.mark.parametrize("name", ["lars", "lamb", "fastadabelief"])
@pytest.mark.parametrize("options", [{"state_dtype": "bfloat16"}, {"state_dtype": "bfloat16", "master": "stochastic"}])
def test_the_same_bits_by_any_threads_and_sweeps(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One go, two sweeps, and two of which the first one keeps nothing."""
    dtype = torch.bfloat16 if "master" in options else torch.float32
    torch.set_num_threads(1)
    expected = trained(name, "cpu", dtype, adapt=False, **options)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        bits_equal(trained(name, "cpu", dtype, adapt=False, **options), expected)
    monkeypatch.setattr(cpu.CpuSweeps, "step", lambda *_: None)
    bits_equal(trained(name, "cpu", dtype, adapt=False, **options), expected)
    measure = cpu.CpuSweeps.measure
    monkeypatch.setattr(
        cpu.CpuSweeps, "measure", lambda self, group, stage, keep: measure(self, group, stage, keep=False)
    )
    bits_equal(trained(name, "cpu", dtype, adapt=False, **options), expected)


@pytest.mark.parametrize("name", ["lars", "lans", "vrlamb", "fastadabelief"])
def test_the_same_bits_by_instructions_that_round_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of the levels that multiply and add in one instruction."""
    if cpu._best_level() < 2:
        pytest.skip("this processor has no AVX-512")
    results = []
    for level in (1, 2):
        monkeypatch.setattr(cpu, "_best_level", lambda level=level: level)
        options = {"state_dtype": "bfloat16", "master": "stochastic", "adapt": False}
        results.append(trained(name, "cpu", torch.bfloat16, **options))
    bits_equal(*results)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_exact_numbers_have_the_bits_of_tensor_operations(level: int, name: str) -> None:
    """Sums that fp32 has without rounding them."""
    generator = torch.Generator().manual_seed(7)
    results = []
    gradients = [torch.randint(512, 1024, (1000,), generator=generator).float() for _ in range(3)]
    for implementation in ("cpu", "eager"):
        w = torch.nn.Parameter(torch.zeros(1000))
        own: dict[str, Any] = {"momentum": 0.5} if name == "lars" else {"betas": (0.5, 0.5)}
        options = {"lr": 0.25, "weight_decay": 0.0, "adapt": False, "state_dtype": "bfloat16", **own}
        optimizer = create_optimizer(name, [("w", w)], implementation=implementation, **options)
        for gradient in gradients:
            w.grad = gradient.clone()
            optimizer.step()
        results.append([optimizer.state[w][key] for key in optimizer.element_state])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)


def test_layers_that_do_not_change_are_not_written() -> None:
    """Of two numbers with the same sum, no other two are made."""
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = LAMB([("w", p)], state_dtype="bfloat16", master="kahan", implementation="cpu")
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p]
    p.data.fill_(1.0)
    state["compensation"].fill_(1.0)
    kept = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq", "compensation")}
    p.grad.zero_()
    optimizer.step()
    assert (p == 1).all()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_norms_are_of_the_sum_of_both_numbers() -> None:
    found = {}

    class Watching(LARS):
        def stages(self, group: Any, layers: Any) -> Any:
            yield from super().stages(group, layers)
            found["w"] = layers.norm("w").item()

    p = torch.nn.Parameter(torch.full((2000,), 1.0, dtype=torch.bfloat16))
    optimizer = Watching([("w", p)], lr=0.0, adapt=True, master="kahan", implementation="cpu")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["compensation"].fill_(2.0**-10)
    assert found["w"] == pytest.approx((1 + 2.0**-10) * 2000**0.5, rel=1e-12)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no such gradients")
def test_gradients_of_16_bits_beside_fp32_weights() -> None:
    results = []
    for implementation in ("cpu", "eager"):
        w = torch.nn.Parameter(torch.linspace(-1, 1, 3001))
        optimizer = LAMB([("w", w)], implementation=implementation, state_dtype="bfloat16", adapt=False)
        w.grad_dtype = None
        for dtype in (torch.bfloat16, torch.float16):
            w.grad = torch.linspace(1, -2, 3001).to(dtype)
            optimizer.step()
        results.append([{"w": w.detach(), **{name: optimizer.state[w][name] for name in optimizer.element_state}}])
    assert_alike(*results)


def test_what_is_not_served_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ps = [torch.nn.Parameter(torch.ones(5, 5, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    for p in ps:
        p.grad = torch.full_like(p, 0.5)
    monkeypatch.setattr(choice, "_warned", set())
    with pytest.warns(UserWarning, match="'cpu' serves .* with state in fp32 or bf16 on one device"):
        LAMB(ps, implementation="cpu").step()
