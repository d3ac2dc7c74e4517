"""LARS and its relatives on a GPU: `MomentumUpdate` in Triton. Imported only where there is Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import address, gradient, gsnr

__all__ = ["momentum"]


@triton.jit
def momentum(
    rows, changing, idle, partial, count,
    weights, gradients, first, second, third, mean_squares, factor,
    gradient_scale, weight_scale, step, second_step, correction1, correction2, correction3, resolution, gsnr_scale,
    decay, rate, offset,
    beta1, beta2, beta3, gain, eps, weight_decay, gsnr_floor, growth, l2, fixed_decay, complement2, complement3,
    KIND: tl.constexpr, MODE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = rows + 4 * tl.program_id(0)
    tensor, start, length, layer = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    offsets = tl.arange(0, BLOCK)
    length *= tl.load(changing + layer)
    mask = offsets < length
    g = gradient(gradients, tensor, start, offsets, length, GRADIENT)
    if KIND == "MOMENTUM_GSNR":
        mean_square = tl.load(address(mean_squares, tensor, start, tl.float32) + offsets, mask=mask, other=0.0)
        mean_square = mean_square * tl.load(factor)
        g = g * gsnr(g, mean_square, tl.load(resolution + layer), tl.load(gsnr_scale + layer), gsnr_floor)
    at_weight = address(weights, tensor, start, WEIGHT) + offsets
    w = tl.load(at_weight, mask=mask, other=0.0).to(tl.float32)
    change = tl.load(gradient_scale + layer) * g + tl.load(weight_scale + layer) * w
    if MOMENTUM:
        at_state = address(first, tensor, start, tl.float32) + offsets
        v = beta1 * tl.load(at_state, mask=mask, other=0.0) + change
        tl.store(at_state, v, mask=mask)
        if NESTEROV:
            change = change + beta1 * v
        else:
            change = v
    tl.store(at_weight, (w - tl.load(step + layer) * change).to(WEIGHT), mask=mask)
