"""Rounding to bf16 by chance: without bias for every kind of number, where it belongs, and what it is good for."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import struct
import weakref
from fractions import Fraction
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS
from trustratio.optimizers.formulas import chunk_view, rounding
from trustratio.optimizers.formulas.rounding import LayerKeys, rest_of, rounded_stochastically, split_sum, sum_of
from trustratio.optimizers.sharding.layout import Layer, LayoutError, Shard
from trustratio.optimizers.sharding.names import observed
from trustratio.optimizers.sharding.positions import positions, runs
from trustratio.optimizers.stepping import storage

from ..references.rounding import rounded

EVERY = torch.arange(1 << 16)
LARGEST = 3.3895313892515355e38  # of bf16
LARGEST_FP32 = 3.4028234663852886e38


def fp32(x: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


# A number -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "x",
    [
        1.0,
        1.0 + 2**-20,
        1.0 + 2**-8,
        2.0 - 2**-23,
        3.14159,
        0.001,
        2.0**-126,
        2.0**-126 + 2.0**-149,
        1e-39,
        1e-44,
        2.0**-149,
        LARGEST,
        LARGEST * (1 - 2**-12),
    ],
)
def test_the_mean_over_all_random_numbers_is_the_number(x: float, sign: int) -> None:
    x = sign * fp32(x)
    found = rounded_stochastically(torch.full((1 << 16,), x), EVERY)
    assert torch.equal(found, found.bfloat16().float())
    kept, counts = found.double().unique(return_counts=True)
    assert len(kept) == 1 + (x != kept[0].item())
    mean = sum(Fraction(value) * count for value, count in zip(kept.tolist(), counts.tolist(), strict=True))
    assert mean / (1 << 16) == Fraction(x)
    # Both are neighbours of x.
    assert all(abs(bits(found)[i].item() - bits(torch.tensor(x)).item()) < 1 << 16 for i in (0, -1))


@pytest.mark.parametrize("x", [0.0, -0.0, 1.5, -(2.0**-133), LARGEST, -LARGEST, math.inf, -math.inf])
def test_what_bf16_has_stays_as_it_is(x: float) -> None:
    found = rounded_stochastically(torch.full((1 << 16,), x), EVERY)
    assert torch.equal(bits(found), bits(torch.full((1 << 16,), x)))


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -0x7FFFFF, -1])
def test_every_nan_becomes_the_same(pattern: int) -> None:
    nan = torch.full((1 << 16,), pattern, dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    assert (bits(rounded_stochastically(nan, EVERY)) == 0x7FC00000).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_largest_number_is_infinity_by_chance(sign: int) -> None:
    """As far as fp32 counts infinity as the next number."""
    x = torch.full((1 << 16,), sign * LARGEST_FP32)
    found = rounded_stochastically(x, EVERY)
    assert found.isinf().sum() == (1 << 16) - 1
    assert found[0] == sign * LARGEST


def test_any_number_equals_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    random = torch.randint(0, 1 << 16, x.shape, generator=generator)
    wanted = torch.tensor([rounded(a, r) for a, r in zip(x.tolist(), random.tolist(), strict=True)])
    assert torch.equal(bits(rounded_stochastically(x, random)), bits(wanted))


def test_tensors_that_are_not_contiguous() -> None:
    x, random = torch.randn(6, 4).t(), torch.randint(0, 1 << 16, (4, 6))
    assert torch.equal(rounded_stochastically(x, random), rounded_stochastically(x.contiguous(), random))


# Where the elements are ---------------------------------------------------------------------------------------------

CUTS: dict[str, tuple[tuple[int, ...], tuple[slice, ...]]] = {
    "all": ((5, 4), (slice(0, 5), slice(0, 4))),
    "rows": ((5, 4), (slice(2, 4), slice(0, 4))),
    "columns": ((5, 12), (slice(0, 5), slice(3, 7))),
    "one column": ((5, 12), (slice(0, 5), slice(11, 12))),
    "last columns": ((5, 12), (slice(0, 5), slice(8, 12))),
    "rows and columns": ((6, 8), (slice(2, 5), slice(1, 3))),
    "one element": ((6, 8), (slice(2, 3), slice(1, 2))),
    "second dimension": ((3, 6, 5), (slice(0, 3), slice(2, 4), slice(0, 5))),
    "third dimension": ((3, 6, 5), (slice(0, 3), slice(0, 6), slice(1, 3))),
    "second and third": ((3, 6, 5), (slice(0, 3), slice(2, 4), slice(1, 3))),
    "a box": ((4, 6, 5), (slice(1, 3), slice(2, 4), slice(1, 3))),
    "a box of four dimensions": ((2, 3, 4, 5), (slice(0, 2), slice(1, 3), slice(2, 4), slice(0, 5))),
}


def cut(name: str, start: int = 0) -> tuple[Layer, Shard, tuple[int, ...], torch.Tensor]:
    """Layer, shard, local shape and the positions of its elements, found by cutting."""
    shape, slices = CUTS[name]
    part = torch.arange(math.prod(shape)).reshape(shape)[slices]
    places = part.flatten()
    span = int(places[-1] - places[0]) + 1
    return Layer(name, shape, 0), Shard(0, start, int(places[0]), len(places), span), tuple(part.shape), places


@pytest.mark.parametrize("name", CUTS)
def test_positions_are_those_of_the_whole_layer(name: str) -> None:
    layer, shard, local_shape, places = cut(name)
    assert torch.equal(positions(layer, shard, local_shape, torch.arange(shard.length)), places)


@pytest.mark.parametrize("start", [0, 17])
@pytest.mark.parametrize("name", CUTS)
def test_runs_are_neighbours_in_the_layer_and_as_long_as_can_be(name: str, start: int) -> None:
    layer, shard, local_shape, places = cut(name, start)
    found = list(runs(layer, shard, local_shape))
    elements = [(begin + i, position + i) for begin, position, length in found for i in range(length)]
    assert elements == [(start + i, place) for i, place in enumerate(places.tolist())]
    assert len(found) == 1 + int((places.diff() != 1).sum())


def test_blocks_whose_rows_are_not_known_are_refused() -> None:
    layer, shard, _, _ = cut("a box")
    with pytest.raises(LayoutError, match="cut it along its first or its second dimension"):
        list(runs(layer, shard, (8,)))


# In a step ----------------------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"state_dtype": "bfloat16"},
    {"master": "stochastic"},
    {"master": "kahan"},
    {"state_dtype": "bfloat16", "master": "stochastic"},
    {"state_dtype": "bfloat16", "master": "kahan"},
]


def layers_of(dtype: torch.dtype = torch.bfloat16, count: int = 4) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5 + i, 7, generator=generator).to(dtype)) for i in range(count)]


def step(optimizer: torch.optim.Optimizer, ps: list[torch.nn.Parameter], number: int, without: set[int]) -> None:
    generator = torch.Generator().manual_seed(number)
    for index, p in enumerate(ps):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = torch.zeros_like(p) if index in without else g
    optimizer.step()


def everything(optimizer: torch.optim.Optimizer, ps: list[torch.nn.Parameter]) -> list[dict[str, torch.Tensor]]:
    return [{"weight": p.detach().clone(), **{n: v.clone() for n, v in optimizer.state[p].items()}} for p in ps]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore:.*did not move in this step")
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("make", [LAMB, functools.partial(LARS, trust_coefficient=1.0)], ids=["lamb", "lars"])
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_layers_of_a_chunk_that_do_not_change_write_nothing(
    make: Any, options: dict[str, Any], implementation: str | None
) -> None:
    """All lie in one chunk. The third has no gradient at first, when its state is made."""
    ps, single = layers_of(), layers_of()[1]
    named = [(f"layer{index}", p) for index, p in enumerate(ps)]
    optimizer = make(named, lr=0.01, implementation=implementation, **options)
    alone = make([("layer1", single)], lr=0.01, implementation=implementation, **options)
    without: list[set[int]] = [{2}, set(), {0, 3}, {1}, set()]
    for number, idle in enumerate(without):
        before = everything(optimizer, ps)
        step(optimizer, ps, number, idle)
        single.grad = ps[1].grad
        alone.step()
        for index, (old, new) in enumerate(zip(before, everything(optimizer, ps), strict=True)):
            if number:
                assert same(old, new) == (index in idle)
            elif index in idle:
                assert torch.equal(old["weight"], new["weight"])
    # What the other layers do does not matter.
    assert same(everything(optimizer, ps)[1], everything(alone, [single])[0])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.filterwarnings("ignore:.*did not move in this step")
def test_the_bits_do_not_depend_on_how_elements_are_put_together(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for elements in (7, 10**6):
        monkeypatch.setattr("trustratio.optimizers.formulas.chunks.CHUNK_ELEMENTS", {"cpu": elements})
        ps = layers_of()
        optimizer = LAMB(ps, lr=0.01, implementation="eager", **options)
        for number in range(4):
            step(optimizer, ps, number, set())
        found.append(everything(optimizer, ps))
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("options", [{"state_dtype": "bfloat16"}, {"master": "stochastic"}])
@pytest.mark.parametrize("changed", ["seed", "name", "step"])
def test_chance_follows_seed_name_and_step(options: dict[str, Any], changed: str) -> None:
    def train(**other: Any) -> torch.Tensor:
        (p,) = layers_of(count=1)
        optimizer = LAMB([(other.get("name", "a"), p)], lr=0.01, implementation="eager", **options)
        optimizer.param_groups[0]["rounding_seed"] = other.get("seed", 0)
        for number in range(2):
            step(optimizer, [p], number, set())
        if changed == "step":
            optimizer.state[p]["step"] += other.get("step", 0)
        step(optimizer, [p], 2, set())
        return optimizer.state[p]["exp_avg"] if "state_dtype" in options else p.detach()

    other = {"seed": {"seed": 1}, "name": {"name": "b"}, "step": {"step": 1}}[changed]
    assert torch.equal(train(), train())
    if changed == "step" and "master" in options:
        return  # the step's own correction changes too
    assert (train() != train(**other)).float().mean() > 0.2


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (2, 5, 2, 2)])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.filterwarnings("ignore:.*did not move in this step")
def test_the_memory_format_does_not_matter(
    shape: tuple[int, ...], options: dict[str, Any], implementation: str | None
) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = torch.nn.Parameter(weights.clone())
    other = torch.nn.Parameter(weights.clone(memory_format=torch.channels_last))
    optimizers = [LAMB([("conv", p)], lr=0.01, implementation=implementation, **options) for p in (plain, other)]
    for number in range(4):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(number)).bfloat16()
        plain.grad, other.grad = g, g.clone(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    one, two = (everything(o, [p])[0] for o, p in zip(optimizers, (plain, other), strict=True))
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert same(one, two)


# What it is good for ------------------------------------------------------------------------------------------------

BETA2, STEPS = 0.999, 400


def second_moment(monkeypatch: pytest.MonkeyPatch, wrong: tuple[Any, str, Any] | None = None) -> torch.Tensor:
    """V of a constant gradient of ones after 400 steps, which is 1 - 0.999^400 = 0.330 without rounding."""
    for place in () if wrong is None else (wrong[0], chunk_view):
        monkeypatch.setattr(place, wrong[1], wrong[2], raising=False)  # type: ignore[index]
    p = torch.nn.Parameter(torch.ones(32, 32))
    optimizer = LAMB([p], lr=0.0, betas=(0.0, BETA2), state_dtype="bfloat16", implementation="eager")
    p.grad = torch.ones_like(p)
    for _ in range(STEPS):
        optimizer.step()
    monkeypatch.undo()
    return optimizer.state[p]["exp_avg_sq"].double()


def test_the_second_moment_stands_still_if_it_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    to_nearest = rounding, "rounded_stochastically", lambda x, random: x.bfloat16().float()
    v = second_moment(monkeypatch, to_nearest)
    # There the next number is 2^-9 away, and a thousandth of what is missing is less than half of that.
    assert (v == 0.25).all()


def test_the_second_moment_is_without_bias_if_it_is_rounded_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    v = second_moment(monkeypatch)
    wanted = 1 - BETA2**STEPS
    assert v.std() < 0.02
    assert abs(v.mean() - wanted) < 4 * v.std() / math.sqrt(v.numel())


def test_the_second_moment_is_torn_apart_if_one_key_is_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LayerKeys.at
    monkeypatch.setattr(LayerKeys, "at", lambda self, step: right(self, torch.ones_like(step)))
    v = second_moment(monkeypatch)
    assert v.std() > 0.1


def test_weights_below_the_resolution_move_on_average() -> None:
    moves = {}
    for master in (None, "stochastic"):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = LARS([p], lr=1e-4, momentum=0.0, adapt=False, master=master, implementation="eager")
        p.grad = torch.ones_like(p)
        for _ in itertools.repeat(None, 100):
            optimizer.step()
        moves[master] = 1 - p.detach().double()
    assert not moves[None].any()
    assert abs(moves["stochastic"].mean() - 0.01) < 4 * moves["stochastic"].std() / 64


# Sums of two numbers ------------------------------------------------------------------------------------------------


def some_sums() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-(1 << 31), 1 << 31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    near = 1 + torch.rand(100_000, generator=generator)
    return torch.cat([whole[whole.isfinite() & (whole.abs() < LARGEST)], near, torch.tensor([0.0, -0.0, 1 + 2**-8])])


@pytest.mark.parametrize("random", [None, 0, 0xFFFF, "any"])
def test_a_sum_is_split_so_that_its_weight_is_the_nearest(random: int | str | None) -> None:
    total = some_sums()
    numbers = torch.randint(1 << 16, total.shape) if random == "any" else None
    if isinstance(random, int):
        numbers = torch.full(total.shape, random)
    weights, rest = split_sum(total, numbers)
    for part in (weights, rest):
        assert torch.equal(part, part.bfloat16().float())
    assert torch.equal((weights + rest).bfloat16().float(), weights)
    assert torch.equal(sum_of(weights, rest), weights + rest)
    assert torch.equal(sum_of(weights.bfloat16(), rest.bfloat16()), weights + rest)
    normal = total.abs() > 2.0**-100
    assert ((weights + rest - total).abs() <= 2.0**-15 * total.abs())[normal].all()
    again = split_sum(weights + rest, numbers)
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], rest)


def test_what_the_nearest_weights_lack_is_less_than_half_a_distance() -> None:
    total = some_sums()
    weights, rest = total.bfloat16().float(), rest_of(total)
    assert torch.equal(sum_of(weights, rest), weights + rest)
    normal = total.abs() > 2.0**-100
    assert ((weights + rest - total).abs() <= 2.0**-16 * total.abs())[normal].all()


def test_weights_that_are_not_finite_have_no_rest() -> None:
    total = torch.tensor([torch.inf, -torch.inf, LARGEST_FP32, torch.nan])
    weights, rest = split_sum(total, torch.zeros(4))
    assert weights.tolist()[:3] == [torch.inf, -torch.inf, torch.inf]
    assert weights[3].isnan()
    assert not rest.any()
    assert not rest_of(total).any()
    assert sum_of(weights, rest).tolist()[:3] == weights.tolist()[:3]


class Nested(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(300, 7)
        self.weight = torch.nn.Parameter(torch.zeros(7, 300))


def test_a_module_called_module_keeps_its_name_under_wrappers() -> None:
    """And its layers draw other bits than those outside of it that are called alike."""
    kept = []
    for prefix in ("", "module.", "module._orig_mod."):
        model = Nested()
        torch.nn.init.zeros_(model.module.weight)
        named = [(f"{prefix}{name}", p) for name, p in model.named_parameters()]
        optimizer = LAMB(named, lr=0.01, adapt=False, state_dtype="bfloat16", implementation="eager")
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.001)
        optimizer.step()
        kept.append([optimizer.state[p]["exp_avg"] for p in (model.module.weight, model.weight)])
    for inside, outside in kept:
        assert torch.equal(inside, kept[0][0])
        assert not torch.equal(inside, outside)


def test_names_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of groups: the search goes through all objects of the process."""
    searches = []
    monkeypatch.setattr(storage, "observed", lambda *given: searches.append(given) or observed(*given))
    ps = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    optimizer = LAMB([{"params": [p]} for p in ps], lr=0.01, state_dtype="bfloat16")
    for _ in range(2):
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(searches) == 1


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}])
def test_an_optimizer_that_nobody_holds_is_gone_at_once(options: dict[str, Any]) -> None:
    """And its state with it: nothing that it keeps from step to step refers to it."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LAMB([p], lr=0.01, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    gc.collect()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
