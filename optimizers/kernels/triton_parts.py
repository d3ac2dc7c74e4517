"""What the kernels in Triton have in common. Imported only where there is Triton."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

__all__ = ["ROW", "address", "block_of", "gradient", "gsnr", "one_for_all", "put_square", "put_sum", "raw_gsnr"]

ROW = tl.constexpr(6)
"""Numbers in a row of the table of blocks, see `BlockTable`."""


def one_for_all(function: Callable[..., None]) -> Any:
    """As `triton.jit`, but with no kernels of their own for counts and addresses that are multiples of 16, or 1."""
    parameters = inspect.signature(function).parameters.items()
    arguments = [name for name, parameter in parameters if "constexpr" not in str(parameter.annotation)]
    return triton.jit(do_not_specialize=arguments, do_not_specialize_on_alignment=arguments)(function)


@triton.jit
def block_of(rows, changing, weights, ALIGNED: tl.constexpr):
    """Of the program's block the tensor, start, length, layer, and place of its sums; empty if its layer stays."""
    row = rows + ROW * tl.program_id(0)
    tensor, layer = tl.load(row), tl.load(row + 3)
    length = tl.load(row + 2) * tl.load(changing + layer)
    length = tl.where(tl.load(weights + tensor) == 0, 0, length)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return tensor, tl.load(row + 1), length, layer, tl.load(row + 5)


@triton.jit
def address(pointers, tensor, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Of the block's first element."""
    at = tl.load(pointers + tensor).to(tl.pointer_type(TYPE)) + start
    if ALIGNED:
        at = tl.multiple_of(at, 16)  # bytes: of 16 elements that lie at a multiple of their size, any dtype is
    return at


@triton.jit
def gradient(pointers, tensor, start, offsets, length, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The gradient in fp32; zero where there is none."""
    length = tl.where(tl.load(pointers + tensor) == 0, 0, length)
    at = address(pointers, tensor, start, TYPE, ALIGNED) + offsets
    return tl.load(at, mask=offsets < length, other=0.0).to(tl.float32)


@triton.jit
def raw_gsnr(g, mean_square, resolution):
    signal = g * g
    variance = mean_square - signal
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays NaN
    return signal / (variance + signal * resolution + 1e-30)


@triton.jit
def gsnr(g, mean_square, resolution, scale, lowest):
    r = raw_gsnr(g, mean_square, resolution) * scale
    return tl.where(r > 1.0, 1.0, tl.where(r < lowest, lowest, r))


@triton.jit
def put_square(partial, place, count, x, WIDE: tl.constexpr):
    """Keep the sum of the squares, of fp64 throughout or of what `_scaled` leaves of them."""
    if WIDE:
        wide = x.to(tl.float64)
        total = tl.sum(wide * wide, 0)
    else:
        scaled, unit = _scaled(x)
        total = _tree(scaled * scaled) * (unit * unit)
    tl.store(partial + place * count, total)


@triton.jit
def put_sum(partial, place, count, x, WIDE: tl.constexpr):
    """Keep the sum of numbers that are not negative, likewise."""
    if WIDE:
        total = tl.sum(x.to(tl.float64), 0)
    else:
        scaled, unit = _scaled(x)
        total = _tree(scaled) * unit
    tl.store(partial + place * count, total)


@triton.jit
def _scaled(x):
    """Divide by a power of two, in fp64, so that the largest squares fit into fp32, and none that count get lost.

    The largest number comes to lie between 1 and 4, or above 2^-23 if it is subnormal.
    """
    exponent = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) >> 23  # NaN does not count; of infinity it is 255
    exponent = tl.minimum(exponent, 253)
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = ((exponent + (1023 - 127)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return x * factor, unit


@triton.jit
def _tree(x):
    """The sum in fp64 of sums in fp32 of 16 numbers each, in a tree: each is rounded four times."""
    for _ in tl.static_range(4):
        x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), 1)
    return tl.sum(x.to(tl.float64), 0)
