"""AdaBelief and FastAdaBelief on a GPU: `BeliefUpdate` in Triton. Imported only where there is Triton."""

from __future__ import annotations

import triton.language as tl

from .triton_parts import address, block_of, gradient, one_for_all, put_square
from .triton_rounding import kept, places, put_weight, rounding_bits, weight

__all__ = ["belief"]


@one_for_all
def belief(
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
    partial, idle = partial + block, idle + block
    offsets = tl.arange(0, BLOCK)
    mask = offsets < length
    at_weight, at_rest = places(weights, compensations, tensor, start, offsets, WEIGHT, MASTER, ALIGNED)
    at_first = address(first, tensor, start, STATE, ALIGNED) + offsets
    at_second = address(second, tensor, start, STATE, ALIGNED) + offsets
    w = weight(at_weight, at_rest, mask, MASTER)
    m = tl.load(at_first, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(at_second, mask=mask, other=1.0).to(tl.float32)
    fresh = mask  # as in triton_adam.py
    written = mask
    if MODE == 3:
        fresh = offsets < length * tl.load(idle)
        written = fresh
    g = tl.zeros((BLOCK,), tl.float32)
    if MODE != 3:
        g = gradient(gradients, tensor, start, offsets, length, GRADIENT, ALIGNED)
    bits = rounding_bits(rows, keys, gammas, idle, layer, offsets, length, STATE, MASTER, MODE)
    if MODE == 1:
        any_gradient = tl.max(tl.where(g != 0.0, 1, 0), 0)  # NaN counts
        tl.store(idle, 1 - any_gradient)
        written = offsets < length * any_gradient
    decayed = g + tl.load(l2 + layer) * w
    surprise = beta1 * (decayed - m)
    m = tl.where(fresh, kept(beta1 * m + gain * decayed, bits, 0, STATE), m)
    variance = tl.load(decay + layer) * s + tl.load(rate + layer) * (surprise * surprise) + growth
    s = tl.where(fresh, kept(variance, bits, 1, STATE), s)
    if MODE != 0:
        tl.store(at_first, m.to(STATE), mask=written)
        tl.store(at_second, s.to(STATE), mask=written)
    if KIND == "BELIEF_MAX" or KIND == "BELIEF_MAX_NO_ROOT":
        at_third = address(third, tensor, start, STATE, ALIGNED) + offsets
        largest = tl.load(at_third, mask=mask, other=1.0).to(tl.float32)
        s = tl.where(fresh, tl.where(largest >= s, largest, s), largest)  # NaN stays NaN
        if MODE != 0:
            tl.store(at_third, s.to(STATE), mask=written)
    denominator = s * tl.load(correction2 + layer)
    if KIND == "BELIEF" or KIND == "BELIEF_MAX":
        denominator = tl.sqrt_rn(denominator)
    denominator = denominator + tl.load(offset + layer)
    u = m * tl.load(correction1 + layer) / denominator + tl.load(weight_decay + layer) * w
    u = tl.where(mask, u, 0.0)
    if MODE < 2:
        put_square(partial, 0, count, w, WIDE)
        put_square(partial, 1, count, g, WIDE)
        put_square(partial, 2, count, u, WIDE)
    else:
        change = u * tl.load(step + layer) + tl.load(fixed_decay + layer) * w
        put_weight(at_weight, at_rest, mask, w - change, bits, WEIGHT, MASTER)
