"""Rounding to bf16 in Triton, and weights that are kept so. Imported only where there is Triton.

The random bits of an element are a function of its layer's key and gamma and of its position in the whole layer, see
`formulas/split_mix.py`: four fields of 16 bits, one for each state and the last one for the weights. Numbers are
rounded by arithmetic on their bits, so that the conversion to bf16 that follows is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import ROW, address

__all__ = ["kept", "places", "put_weight", "random_bits", "rounding_bits", "stochastic", "to_nearest", "weight"]


@triton.jit
def random_bits(rows, keys, gammas, layer, offsets, wanted):
    """The first 64 random bits of each element of this block; zeros if `wanted` is zero, which costs nothing."""
    bits = tl.zeros_like(offsets).to(tl.uint64)
    if wanted != 0:
        first = tl.load(rows + ROW * tl.program_id(0) + 4).to(tl.uint64) + 1
        key, gamma = tl.load(keys + layer).to(tl.uint64), tl.load(gammas + layer).to(tl.uint64)
        z = (key + first * gamma) + offsets.to(tl.uint64) * gamma  # of short factors the product is cheaper
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        bits = z ^ (z >> 31)
    return bits


@triton.jit
def rounding_bits(
    rows, keys, gammas, idle, layer, offsets, length, STATE: tl.constexpr, MASTER: tl.constexpr, MODE: tl.constexpr
):
    """The random bits of a block whose state is updated, of the weights too in a mode that writes them."""
    bits = offsets  # nobody reads these
    if tl.bfloat16 == STATE or (MASTER != "none" and MODE >= 2):
        wanted = length
        if MODE == 3 and MASTER == "none":
            wanted *= tl.load(idle)  # the state of all other blocks is up to date
        bits = random_bits(rows, keys, gammas, layer, offsets, wanted)
    return bits


@triton.jit
def _number_bits(x):
    """The bits of fp32 numbers; of NaN always the same ones, from which adding 16 bits makes no other number."""
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000).to(tl.uint32)


@triton.jit
def _without_tail(bits):
    """The fp32 numbers of these bits, the lower 16 left out."""
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def stochastic(x, bits, FIELD: tl.constexpr):
    """Fp32 rounded to a neighbour in bf16, to each with the chance that keeps the mean."""
    return _without_tail(_number_bits(x) + ((bits >> (16 * FIELD)).to(tl.uint32) & 0xFFFF))


@triton.jit
def to_nearest(x):
    """Fp32 rounded to the nearest number in bf16, to the even one of two; the interpreter's conversion cuts off."""
    number = _number_bits(x)
    return _without_tail(number + 0x7FFF + ((number >> 16) & 1))


@triton.jit
def _finite(x):
    """Zero in the place of NaN and infinity."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def kept(x, bits, FIELD: tl.constexpr, STATE: tl.constexpr):
    """Updated state, in fp32, as it will be read again."""
    if tl.bfloat16 == STATE:
        x = stochastic(x, bits, FIELD)
    return x


@triton.jit
def places(
    weights, compensations, tensor, start, offsets,
    WEIGHT: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where the weights are and, with the master "kahan", what they lack of their sums."""
    at_weight = address(weights, tensor, start, WEIGHT, ALIGNED) + offsets
    at_rest = at_weight
    if MASTER == "kahan":
        at_rest = address(compensations, tensor, start, WEIGHT, ALIGNED) + offsets
    return at_weight, at_rest


@triton.jit
def weight(at_weight, at_rest, mask, MASTER: tl.constexpr):
    """The weights in fp32."""
    w = tl.load(at_weight, mask=mask, other=0.0).to(tl.float32)
    if MASTER == "kahan":
        total = w + tl.load(at_rest, mask=mask, other=0.0).to(tl.float32)
        w = tl.where(to_nearest(total) == w, total, w)  # else the rest is of other weights
    return w


@triton.jit
def put_weight(at_weight, at_rest, mask, w, bits, WEIGHT: tl.constexpr, MASTER: tl.constexpr):
    """Keep the new weights, given in fp32."""
    if MASTER == "stochastic":
        w = stochastic(w, bits, 3)
    if MASTER == "kahan":
        nearest = to_nearest(w)
        # A rest that is rounded to half a distance lies as near to the next weight, which may be the even one.
        total = nearest + stochastic(_finite(w - nearest), bits, 3)
        w = to_nearest(total)
        tl.store(at_rest, _finite(total - w).to(WEIGHT), mask=mask)
    tl.store(at_weight, w.to(WEIGHT), mask=mask)
