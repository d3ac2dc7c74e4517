"""Sums of weights, gradients and what is made of them, on a GPU: no state. Imported only where there is Triton."""

from __future__ import annotations

import triton.language as tl

from .triton_parts import address, block_of, gradient, gsnr, one_for_all, put_square, put_sum, raw_gsnr
from .triton_rounding import places, weight

__all__ = ["sums"]


@one_for_all
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
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tensor, start, length, layer, block = block_of(rows, changing, weights, ALIGNED)
    partial += block
    offsets = tl.arange(0, BLOCK)
    mask = offsets < length
    g = gradient(gradients, tensor, start, offsets, length, GRADIENT, ALIGNED)
    if KIND == "SUM_R_G" or KIND == "SUM_W_G_GSNR":
        mean_square = tl.load(address(mean_squares, tensor, start, tl.float32, ALIGNED) + offsets, mask=mask, other=0.0)
        mean_square = mean_square * tl.load(factor)
        bound = tl.load(resolution + layer)
        if KIND == "SUM_R_G":
            put_sum(partial, 2, count, raw_gsnr(g, mean_square, bound), WIDE)
        else:
            g = g * gsnr(g, mean_square, bound, tl.load(gsnr_scale + layer), gsnr_floor)
    put_square(partial, 1, count, g, WIDE)
    if KIND != "SUM_G" and KIND != "SUM_R_G":
        at_weight, at_rest = places(weights, compensations, tensor, start, offsets, WEIGHT, MASTER, ALIGNED)
        w = weight(at_weight, at_rest, mask, MASTER)
        put_square(partial, 0, count, w, WIDE)
        if KIND == "SUM_W_G_D":
            put_square(partial, 2, count, g + tl.load(weight_decay + layer) * w, WIDE)
