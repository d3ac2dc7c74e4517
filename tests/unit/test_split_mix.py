"""The generator behind stochastic rounding: what the contract says bit for bit, and that it looks random.

Each statistic is a number of standard deviations, which must be below 4, for fixed keys: some five hundred numbers, of
which not even one in ten is expected beyond.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from trustratio.optimizers.formulas import split_mix as module
from trustratio.optimizers.formulas.rounding import WORD, LayerKeys, field_of_state
from trustratio.optimizers.formulas.split_mix import gamma_of, key_of, signed, split_mix

from ..references.rounding import Chances
from ..references.rounding import gamma_of as plain_gamma_of

CHUNK = 1 << 20
QUICK, SLOW = CHUNK, 25 * CHUNK  # words of 64 bits: four times as many draws
SIZES = [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)]
sizes = pytest.mark.parametrize("size", SIZES)
CPU = torch.device("cpu")


def keys_of(step: int, seed: int = 0, layer: str = "encoder.layer.0.weight") -> tuple[torch.Tensor, torch.Tensor]:
    keys = LayerKeys(seed, [layer], CPU)
    return keys.at(torch.tensor([float(step)], dtype=torch.float64))[0], keys.gammas[0]


def words(size: int, step: int = 1, number: int = 0, first: int = 0, **of_layer: object) -> Iterator[torch.Tensor]:
    """Words of the elements of a layer, in chunks."""
    key, gamma = keys_of(step, **of_layer)  # type: ignore[arg-type]
    for begin in range(first, first + size, CHUNK):
        yield split_mix(key + signed(number * WORD % (1 << 64)), torch.arange(begin, begin + CHUNK), gamma)


def fields_of(word: torch.Tensor) -> torch.Tensor:
    """Four numbers of 16 bits, shape (4, elements)."""
    return torch.stack([(word >> 16 * place) & 0xFFFF for place in range(4)])


def deviation(total: float, draws: int, mean: float, variance: float) -> float:
    return (total - draws * mean) / math.sqrt(draws * variance)


# What it is ---------------------------------------------------------------------------------------------------------


def test_it_equals_whole_numbers_of_python() -> None:
    layers = ["embedding", "encoder.layer.0.bias", "decoder[2]"]
    positions = [0, 1, 2, 1000, 2**31, 2**40 + 3]
    for seed, step in itertools.product((0, 1, 2**64 + 5), (1, 2, 3, 10**6)):
        keys = LayerKeys(seed, layers, CPU)
        at = keys.at(torch.full((3,), float(step)))
        for index, layer in enumerate(layers):
            chances = Chances(seed, layer, step)
            for number in (0, 1, 2):
                key = at[index] + signed(number * WORD % (1 << 64))
                found = split_mix(key, torch.tensor(positions), keys.gammas[index])
                assert [bits % (1 << 64) for bits in found.tolist()] == [chances.word(i, number) for i in positions]


def test_its_first_numbers() -> None:
    """Those of the published SplitMix64 for the seed 1234567."""
    found = split_mix(1234567, torch.arange(3)).tolist()
    assert [bits % (1 << 64) for bits in found] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_fields_of_states_leave_out_that_of_weights() -> None:
    assert [field_of_state(index) for index in range(8)] == [0, 1, 2, 4, 5, 6, 8, 9]


def test_gammas_are_odd_and_change_often() -> None:
    gammas = [gamma_of(seed, f"layer{i}") for seed in range(4) for i in range(2500)]
    assert all(gamma % 2 == 1 and 0 < gamma < 1 << 64 for gamma in gammas)
    assert all((gamma ^ (gamma >> 1)).bit_count() >= 24 for gamma in gammas)
    assert len(set(gammas)) == len(gammas)
    assert gammas[:100] == [plain_gamma_of(0, f"layer{i}") for i in range(100)]


@pytest.mark.parametrize("hashed", [0, 1, 2**63, 2**64 - 1, 0xFF << 20, 0xFFFFFFFF, 0x5555])
def test_gammas_that_change_too_seldom_are_replaced(monkeypatch: pytest.MonkeyPatch, hashed: int) -> None:
    monkeypatch.setattr(module, "key_of", lambda *parts: hashed)
    gamma = gamma_of(0, "layer")
    assert gamma % 2 == 1
    assert (gamma ^ (gamma >> 1)).bit_count() >= 24


def test_keys_do_not_depend_on_the_process() -> None:
    assert key_of(0, "dense.weight") == 15464808451736481772


# That it looks random -----------------------------------------------------------------------------------------------


@sizes
def test_fields_have_the_mean_that_is_without_bias(size: int) -> None:
    totals = sum(fields_of(word).sum(dim=1) for word in words(size))
    for total in totals.tolist():  # type: ignore[union-attr]
        assert abs(deviation(total, size, 65535 / 2, (2**32 - 1) / 12)) < 4


@sizes
def test_every_bit_is_set_half_of_the_time(size: int) -> None:
    counts = torch.zeros(64, dtype=torch.int64)
    for word in words(size, layer="bits"):
        counts += torch.stack([((word >> place) & 1).sum() for place in range(64)])
    assert all(abs(deviation(count, size, 1 / 2, 1 / 4)) < 4 for count in counts.tolist())


@sizes
def test_fields_have_every_number_equally_often(size: int) -> None:
    counts = torch.zeros(4, 1 << 16)
    for word in words(size, layer="numbers"):
        counts += torch.stack([torch.bincount(field, minlength=1 << 16) for field in fields_of(word)])
    wanted = size / (1 << 16)
    for chi_square in ((counts - wanted).square().sum(dim=1, dtype=torch.float64) / wanted).tolist():
        degrees = (1 << 16) - 1
        assert abs(chi_square - degrees) / math.sqrt(2 * degrees) < 4


SEQUENCES = {
    "the next step": {"step": 2},
    "a later step": {"step": 1001},
    "another layer": {"layer": "encoder.layer.1.weight"},
    "another segment": {"layer": "encoder.layer.0.weight[1]"},
    "another seed": {"seed": 1},
    "the next word": {"number": 1},
    "a later word": {"number": 2},
    "the neighbour": {"first": 1},
    "the element below": {"first": 1024},
    "a distant one": {"first": 2**33 + 1},
}


@pytest.mark.parametrize("other", SEQUENCES)
@sizes
def test_other_elements_steps_layers_and_seeds_have_nothing_to_do_with_it(size: int, other: str) -> None:
    products = torch.zeros(4, 4, dtype=torch.float64)
    different_bits = 0
    for one, two in zip(words(size), words(size, **SEQUENCES[other]), strict=True):  # type: ignore[arg-type]
        a, b = (fields_of(word).double() - 65535 / 2 for word in (one, two))
        products += a @ b.T
        bits = one ^ two
        different_bits += sum(int(((bits >> place) & 1).sum()) for place in range(0, 64, 7))
    spread = (2**32 - 1) / 12 * math.sqrt(size)
    assert float(products.abs().max()) / spread < 4
    assert abs(deviation(different_bits, 10 * size, 1 / 2, 1 / 4)) < 4


@sizes
def test_fields_of_an_element_have_nothing_to_do_with_each_other(size: int) -> None:
    products = torch.zeros(4, 4, dtype=torch.float64)
    for word in words(size, layer="fields"):
        fields = fields_of(word).double() - 65535 / 2
        products += fields @ fields.T
    spread = (2**32 - 1) / 12 * math.sqrt(size)
    assert float((products - products.diag().diag()).abs().max()) / spread < 4


def test_layers_and_steps_have_no_numbers_in_common() -> None:
    """As sequences with one γ would, wherever their keys are a few times γ apart."""
    many = [
        *(next(words(CHUNK, step=step)) for step in range(1, 6)),
        *(next(words(CHUNK, layer=f"layer{i}")) for i in range(5)),
        *(next(words(CHUNK, number=number)) for number in (1, 2)),
    ]
    everything = torch.cat(many)
    assert len(everything.unique()) == len(everything)
