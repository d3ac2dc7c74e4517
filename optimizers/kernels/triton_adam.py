"""LAMB and its relatives on a GPU: `AdamUpdate` in Triton. Imported only where there is Triton."""

from __future__ import annotations

import triton.language as tl

from .triton_parts import address, block_of, gradient, gsnr, one_for_all, put_square
from .triton_rounding import kept, places, put_weight, rounding_bits, weight

__all__ = ["adam"]


@one_for_all
def adam(
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
    v = tl.load(at_second, mask=mask, other=1.0).to(tl.float32)
    # Which elements' averages are updated here. Of a block whose gradient is zero, not while measuring.
    fresh = mask
    written = mask
    if MODE == 3:
        fresh = offsets < length * tl.load(idle)
        written = fresh
    g = tl.zeros((BLOCK,), tl.float32)
    if MODE != 3 or KIND == "LANS":
        g = gradient(gradients, tensor, start, offsets, length, GRADIENT, ALIGNED)
    bits = rounding_bits(rows, keys, gammas, idle, layer, offsets, length, STATE, MASTER, MODE)
    if MODE == 1:
        any_gradient = tl.max(tl.where(g != 0.0, 1, 0), 0)  # NaN counts
        tl.store(idle, 1 - any_gradient)
        written = offsets < length * any_gradient
    scaled = g * tl.load(gradient_scale + layer)
    adapted = scaled
    if KIND == "ADAM_GSNR" or KIND == "ADAM_GSNR_MEAN":
        at_mean = address(mean_squares, tensor, start, tl.float32, ALIGNED) + offsets
        at_third = address(third, tensor, start, STATE, ALIGNED) + offsets
        mean_square = tl.load(at_mean, mask=fresh, other=0.0) * tl.load(factor)
        r = gsnr(g, mean_square, tl.load(resolution + layer), tl.load(gsnr_scale + layer), gsnr_floor)
        p = kept(beta3 * tl.load(at_third, mask=fresh, other=0.0).to(tl.float32) + complement3 * r, bits, 2, STATE)
        adapted = p * tl.load(correction3 + layer) * scaled
        if MODE != 0:
            tl.store(at_third, p.to(STATE), mask=written)
    squared = adapted
    if KIND == "ADAM_GSNR_MEAN":
        squared = scaled
    m = tl.where(fresh, kept(beta1 * m + gain * adapted, bits, 0, STATE), m)
    v = tl.where(fresh, kept(beta2 * v + complement2 * (squared * squared), bits, 1, STATE), v)
    if MODE != 0:
        tl.store(at_first, m.to(STATE), mask=written)
        tl.store(at_second, v.to(STATE), mask=written)
    root = tl.sqrt_rn(v * tl.load(correction2 + layer))
    denominator = root + eps
    decayed = tl.load(weight_decay + layer) * w
    u = m * tl.load(correction1 + layer) / denominator + decayed
    u = tl.where(mask, u, 0.0)
    u_g = u
    if KIND == "LANS":
        u_g = tl.where(mask, scaled / denominator + decayed, 0.0)
    if MODE < 2:
        put_square(partial, 0, count, w, WIDE)
        put_square(partial, 1, count, g, WIDE)
        put_square(partial, 2, count, u, WIDE)
        if KIND == "LANS":
            put_square(partial, 3, count, u_g, WIDE)
        if CLIPS:
            put_square(
                partial, 4, count, squared / tl.where(root < smallest_root, smallest_root, root), WIDE
            )  # NaN stays
    else:
        change = u * tl.load(step + layer)
        if KIND == "LANS":
            change = change + u_g * tl.load(second_step + layer)
        if DECAYS:
            change = change + w * tl.load(weight_scale + layer)
        put_weight(at_weight, at_rest, mask, w - change, bits, WEIGHT, MASTER)
