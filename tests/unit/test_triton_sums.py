"""Sums of squares on a GPU that is slow in fp64: in fp32 within 16 neighbours, in fp64 beyond, by the interpreter."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from trustratio.optimizers.kernels import triton_kernels, triton_parts
from trustratio.optimizers.kernels.triton_kernels import TritonKernels

from . import test_kernels_guarantees as guarantees
from .kernel_runs import assert_close, flat_run, states
from .test_triton_kernels import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
    pytest.mark.filterwarnings("ignore:.*overflow encountered.*"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these on the device"),
]

Tensor = torch.Tensor
BLOCK = triton_kernels.BLOCK
LARGEST = torch.finfo(torch.float32).max


@triton.jit
def _sums(x, found, WIDE: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    numbers = tl.load(x + tl.arange(0, COUNT))
    triton_parts.put_square(found, 0, 1, numbers, WIDE)
    triton_parts.put_sum(found, 1, 1, tl.abs(numbers), WIDE)


def sums(x: Tensor, *, wide: bool = False, device: str = "cpu") -> tuple[float, float]:
    """The sum of the squares, and that of the magnitudes."""
    padded = torch.zeros(BLOCK, device=device)
    padded[: len(x)] = x
    found = torch.full((2,), torch.nan, dtype=torch.float64, device=device)
    _sums[(1,)](padded, found, WIDE=wide, COUNT=BLOCK)
    squares, magnitudes = found.tolist()
    return squares, magnitudes


def assert_right(x: Tensor, tolerance: float = 2e-7) -> None:
    squares, magnitudes = sums(x)
    wanted = x.double().norm().item()
    assert wanted > 0
    assert abs(math.sqrt(squares) - wanted) <= tolerance * wanted
    assert magnitudes == pytest.approx(x.double().abs().sum().item(), rel=2 * tolerance)


def drawn(count: int = BLOCK, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exponent", range(-30, 31, 5))
def test_norms_of_all_sizes(exponent: int) -> None:
    """Squares of most would be nothing, or infinite, in fp32."""
    assert_right(drawn(seed=exponent) * 10.0**exponent)


@pytest.mark.parametrize("number", [1.1, 1 + 2**-12, 3.0000002, 1.9999999, 1 / 3, 0.7e-20, 3.3e25])
def test_equal_numbers(number: float) -> None:
    """Whose roundings all go the same way."""
    assert_right(torch.full((BLOCK,), number))
    assert_right(torch.full((777,), number))


def test_numbers_of_very_different_sizes() -> None:
    x = drawn() * torch.logspace(-38, 37, BLOCK)
    assert_right(x)
    small = torch.full((BLOCK,), 2.0**-13)
    small[5] = 1.0  # each square is lost beside this one, and all together are not
    assert_right(small)


@pytest.mark.parametrize("number", [1e-45, 1e-40, 1.1754942e-38, 1.1754944e-38, 2.0**-126, LARGEST, LARGEST / 2])
def test_the_ends_of_fp32(number: float) -> None:
    """Subnormal numbers too; what is not zero has a sum that is not zero."""
    for count in (1, 16, BLOCK):
        assert_right(torch.full((count,), number))


def rounded_down(total: int, levels: int) -> list[int]:
    """Numbers of 24 bits whose sum by pairs, pairs of pairs and so on, each rounded, falls behind as far as it can."""
    if levels == 0:
        return [total]
    # An even sum of 25 bits, plus one, is rounded to the even number of 24; an odd one has two that are even.
    parts = (total, total + 1) if total % 2 == 0 else (total - 1, total + 1)
    return [number for part in parts for number in rounded_down(part, levels - 1)]


def test_only_neighbours_are_added_in_fp32() -> None:
    x = torch.tensor(rounded_down(1 << 23, 11), dtype=torch.float32)
    assert len(x) == BLOCK
    error = 1 - sums(x)[1] / x.double().sum().item()
    assert 2**-24 < error <= 4 * 2**-24  # of eleven roundings it would be more


def test_zero_is_zero() -> None:
    assert sums(torch.zeros(BLOCK)) == (0.0, 0.0)
    assert sums(torch.full((BLOCK,), -0.0)) == (0.0, 0.0)


@pytest.mark.parametrize("place", [0, 17, BLOCK - 1])
def test_what_is_not_finite_stays(place: int) -> None:
    for others in (torch.zeros(BLOCK), drawn(), drawn() * 1e38):
        for number in (math.inf, -math.inf):
            others[place] = number
            assert sums(others) == (math.inf, math.inf)
        others[place] = math.nan
        assert all(map(math.isnan, sums(others)))
        others[place - 1] = math.inf
        assert all(map(math.isnan, sums(others)))


def test_sums_in_fp64_are_those_of_fp64() -> None:
    x = drawn()
    assert sums(x, wide=True)[0] == pytest.approx(x.double().square().sum().item(), rel=1e-14)
    assert sums(x)[0] != sums(x, wide=True)[0]


# Steps --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_trees(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every launch of a test adds squares in trees; what they were told."""
    monkeypatch.setattr(triton_kernels, "KERNELS", TritonKernels(wide=False))
    told: list[bool] = []

    class Watched:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **constants: Any) -> None:
                told.append(constants["WIDE"])
                self.kernel[grid](*args, **constants)

            return launch

    watched = {name: Watched(kernel) for name, kernel in triton_kernels._KERNELS.items()}
    monkeypatch.setattr(triton_kernels, "_KERNELS", watched)
    return told


@pytest.mark.parametrize(
    ("name", "options"),
    [("lars", {}), ("lamb", {"update_clip": 0.5}), ("lans", {}), ("vrlamb", {}), ("clars", {}), ("adabelief", {})],
)
def test_steps_equal_tensor_operations(name: str, options: dict[str, Any], in_trees: list[bool]) -> None:
    parameters, optimizer = run(name, "triton", **options)
    assert in_trees
    assert not any(in_trees)
    expected, reference = run(name, "eager", **options)
    assert_close(parameters, expected, 1e-6)
    for state in (*optimizer.element_state, *optimizer.layer_state):
        assert_close(states(optimizer, parameters, state), states(reference, expected, state), 2e-6)
    assert optimizer.trust_ratios() == pytest.approx(reference.trust_ratios(), rel=1e-6)


def test_layers_without_gradient_and_odd_places(in_trees: list[bool]) -> None:
    lengths, gaps = [1, 15, 33, BLOCK, BLOCK + 7, 16, 5], [3, 0, 1, 2, 1, 0, 9]
    assert_close(flat_run("lamb", "triton", lengths, gaps), flat_run("lamb", "eager", lengths, gaps), 1e-6)
    assert in_trees


def test_a_gradient_that_is_not_finite_changes_nothing(in_trees: list[bool]) -> None:
    guarantees.test_a_gradient_that_is_not_finite_changes_nothing("vrlamb", "triton")
    assert in_trees


@pytest.mark.parametrize(
    ("capability", "wide"),
    [
        *(((7, 0), True), ((8, 0), True), ((9, 0), True), ((10, 0), True)),
        *(((7, 5), False), ((8, 6), False), ((8, 9), False), ((10, 3), False), ((12, 0), False), ((12, 1), False)),
    ],
)
def test_the_capability_decides(capability: tuple[int, int], wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    operands: Any = SimpleNamespace(layout=SimpleNamespace(device=torch.device("cuda")))
    assert TritonKernels().open(operands, [], {}).wide is wide
    assert TritonKernels(wide=not wide).open(operands, [], {}).wide is not wide
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert TritonKernels().open(operands, [], {}).wide
