"""What the kernels in Triton have in common. Imported only where there is Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ROW", "address", "gradient", "gsnr", "put_square", "raw_gsnr"]

ROW = tl.constexpr(5)
"""Numbers in a row of the table of blocks: tensor, start, length, layer, position of the first element in the layer."""


@triton.jit
def address(pointers, tensor, start, TYPE: tl.constexpr):
    return tl.load(pointers + tensor).to(tl.pointer_type(TYPE)) + start


@triton.jit
def gradient(pointers, tensor, start, offsets, length, TYPE: tl.constexpr):
    """The gradient in fp32; zero where there is none."""
    length = tl.where(tl.load(pointers + tensor) == 0, 0, length)
    at = address(pointers, tensor, start, TYPE) + offsets
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
def put_square(partial, place, count, x):
    wide = x.to(tl.float64)
    tl.store(partial + place * count + tl.program_id(0), tl.sum(wide * wide, 0))
