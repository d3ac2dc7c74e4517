"""LARS and its relatives on a GPU: `MomentumUpdate` in Triton. Imported only where there is Triton."""

from __future__ import annotations

import triton.language as tl

from .triton_parts import address, block_of, gradient, gsnr, one_for_all
from .triton_rounding import kept, places, put_weight, rounding_bits, weight

__all__ = ["momentum"]


@one_for_all
def momentum(
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
    idle += block
    offsets = tl.arange(0, BLOCK)
    mask = offsets < length
    g = gradient(gradients, tensor, start, offsets, length, GRADIENT, ALIGNED)
    if KIND == "MOMENTUM_GSNR":
        mean_square = tl.load(address(mean_squares, tensor, start, tl.float32, ALIGNED) + offsets, mask=mask, other=0.0)
        mean_square = mean_square * tl.load(factor)
        g = g * gsnr(g, mean_square, tl.load(resolution + layer), tl.load(gsnr_scale + layer), gsnr_floor)
    at_weight, at_rest = places(weights, compensations, tensor, start, offsets, WEIGHT, MASTER, ALIGNED)
    w = weight(at_weight, at_rest, mask, MASTER)
    bits = rounding_bits(rows, keys, gammas, idle, layer, offsets, length, STATE, MASTER, MODE)
    change = tl.load(gradient_scale + layer) * g + tl.load(weight_scale + layer) * w
    if MOMENTUM:
        at_state = address(first, tensor, start, STATE, ALIGNED) + offsets
        v = kept(beta1 * tl.load(at_state, mask=mask, other=0.0).to(tl.float32) + change, bits, 0, STATE)
        tl.store(at_state, v.to(STATE), mask=mask)
        if NESTEROV:
            change = change + beta1 * v
        else:
            change = v
    put_weight(at_weight, at_rest, mask, w - tl.load(step + layer) * change, bits, WEIGHT, MASTER)
