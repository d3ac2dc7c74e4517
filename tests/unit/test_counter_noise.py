"""Numbers by position: those of SplitMix64, of the moments that they should have, wherever a shard lies."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from trustratio.optimizers.displacements.counter_noise import gaussian, uniform
from trustratio.optimizers.formulas.split_mix import key_of, split_mix
from trustratio.optimizers.sharding.layout import Layer, LayoutError, Shard
from trustratio.optimizers.sharding.positions import positions, run_length, runs

COUNT = 200_000
DRAWS = {"gaussian": (gaussian, 3.0), "uniform": (uniform, 9 / 5)}  # and the fourth moment


def splitmix_of_python(key: int, position: int) -> int:
    mask = (1 << 64) - 1
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the first ones of seed 0
    assert [bits % (1 << 64) for bits in split_mix(0, torch.arange(3)).tolist()] == published
    for key in (1, 1 << 63, (1 << 64) - 1):
        at = torch.tensor([0, 1, 2**31, 2**40 + 7])
        wanted = [splitmix_of_python(key, position) for position in at.tolist()]
        assert [bits % (1 << 64) for bits in split_mix(key, at).tolist()] == wanted


@pytest.mark.parametrize("name", DRAWS)
def test_moments(name: str) -> None:
    draw, fourth = DRAWS[name]
    z = draw(key_of(0, 0, "layer"), torch.arange(COUNT))
    error = 5 / math.sqrt(COUNT)
    assert z.dtype == torch.float64
    assert abs(z.mean().item()) < error
    assert abs(z.square().mean().item() - 1) < 2 * error
    assert abs(z.pow(3).mean().item()) < 4 * error
    assert abs(z.pow(4).mean().item() - fourth) < 10 * error
    assert z.isfinite().all()


@pytest.mark.parametrize("name", DRAWS)
def test_neighbours_steps_layers_and_seeds_are_not_correlated(name: str) -> None:
    draw, _ = DRAWS[name]
    at, error = torch.arange(COUNT), 5 / math.sqrt(COUNT)
    keys = [key_of(seed, step, layer) for seed, step, layer in product((0, 1), (0, 1), ("layer", "layes"))]
    drawn = [draw(key, at) for key in keys]
    for lag in (1, 2, 3, 64, 1024):
        assert abs((drawn[0][lag:] * drawn[0][:-lag]).mean().item()) < error
    for other in drawn[1:]:
        assert abs((drawn[0] * other).mean().item()) < error
    squares = drawn[0].square() - 1
    assert abs((squares[1:] * squares[:-1]).mean().item()) < 10 * error


def test_the_uniform_ones_are_within_their_bounds() -> None:
    z = uniform(3, torch.arange(COUNT))
    assert z.abs().max().item() < math.sqrt(3)
    counts = torch.histc(z, bins=10, min=-math.sqrt(3), max=math.sqrt(3)) / COUNT
    assert counts == pytest.approx([0.1] * 10, abs=0.005)


def test_keys_are_the_same_in_every_process() -> None:
    assert key_of(0, 1, "weight") == 0x647FC4F49ED9E3BD
    assert len({key_of(seed, step, name) for seed in range(4) for step in range(4) for name in "ab"}) == 32


def test_an_element_is_the_same_however_its_layer_is_cut() -> None:
    whole = gaussian(7, torch.arange(1000))
    parts = [gaussian(7, torch.arange(begin, begin + 250)) for begin in range(0, 1000, 250)]
    assert torch.equal(torch.cat(parts), whole)


# Positions in the whole layer ----------------------------------------------------------------------------------------

SHAPE = (6, 4, 10)
WHOLE = torch.arange(240).view(SHAPE)


BOXES = [
    (slice(2, 5), slice(0, 4), slice(0, 10)),  # a run
    (slice(0, 6), slice(1, 3), slice(0, 10)),  # a block of rows
    (slice(0, 6), slice(0, 4), slice(3, 7)),  # a box
    (slice(1, 4), slice(2, 4), slice(5, 10)),
    (slice(5, 6), slice(3, 4), slice(9, 10)),
]


@pytest.mark.parametrize("box", BOXES)
def test_positions(box: tuple[slice, ...]) -> None:
    local = WHOLE[box]
    first, last = int(local.flatten()[0]), int(local.flatten()[-1])
    shard = Shard(0, 0, first, local.numel(), span=last - first + 1)
    found = positions(Layer("layer", SHAPE, 0), shard, tuple(local.shape), torch.arange(local.numel()))
    assert torch.equal(found, local.flatten())


@pytest.mark.parametrize("box", BOXES)
def test_runs(box: tuple[slice, ...]) -> None:
    """They are the longest ones of neighbours, all of one length, and tell the same positions."""
    local = WHOLE[box].flatten()
    shard = Shard(0, 7, int(local[0]), local.numel(), span=int(local[-1] - local[0]) + 1)
    layer, shape = Layer("layer", SHAPE, 0), tuple(WHOLE[box].shape)
    found = list(runs(layer, shard, shape))
    assert [start for start, _, _ in found] == list(range(7, 7 + local.numel(), run_length(layer, shard, shape)))
    assert [p for _, first, length in found for p in range(first, first + length)] == local.tolist()
    ends = [first + length for _, first, length in found]
    assert not set(ends) & {first for _, first, _ in found}


def test_blocks_of_unknown_rows_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"layer of shape .* is cut into blocks in which the position"):
        positions(Layer("layer", SHAPE, 0), Shard(0, 0, 3, 96, span=234), (96,), torch.arange(96))
