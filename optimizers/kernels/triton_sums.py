"""Sums of weights, gradients and what is made of them, on a GPU: no state. Imported only where there is Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import ROW, address, gradient, gsnr, put_square, raw_gsnr
from .triton_rounding import places, weight

__all__ = ["sums"]


@triton.jit
def sums(
    rows, changing, idle, partial, count,
    weights, gradients, first, second, third, mean_squares, factor, compensations, keys, gammas,
    gradient_scale, weight_scale, step, second_step, correction1, correction2, correction3, resolution, gsnr_scale,
    decay, rate, offset, weight_decay, l2, fixed_decay,
    beta1, beta2, beta3, gain, eps, gsnr_floor, growth, smallest_root,
    complement2, complement3,
    KIND: tl.constexpr, MODE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    CLIPS: tl.constexpr, DECAYS: tl.constexpr,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = rows + ROW * tl.program_id(0)
    tensor, start, length, layer = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    offsets = tl.arange(0, BLOCK)
    length *= tl.load(changing + layer)
    mask = offsets < length
    g = gradient(gradients, tensor, start, offsets, length, GRADIENT)
    if KIND == "SUM_R_G" or KIND == "SUM_W_G_GSNR":
        mean_square = tl.load(address(mean_squares, tensor, start, tl.float32) + offsets, mask=mask, other=0.0)
        mean_square = mean_square * tl.load(factor)
        bound = tl.load(resolution + layer)
        if KIND == "SUM_R_G":
            r = raw_gsnr(g, mean_square, bound)
            tl.store(partial + 2 * count + tl.program_id(0), tl.sum(r.to(tl.float64), 0))
        else:
            g = g * gsnr(g, mean_square, bound, tl.load(gsnr_scale + layer), gsnr_floor)
    put_square(partial, 1, count, g)
    if KIND != "SUM_G" and KIND != "SUM_R_G":
        at_weight, at_rest = places(weights, compensations, tensor, start, offsets, WEIGHT, MASTER)
        w = weight(at_weight, at_rest, mask, MASTER)
        put_square(partial, 0, count, w)
        if KIND == "SUM_W_G_D":
            put_square(partial, 2, count, g + tl.load(weight_decay + layer) * w)
