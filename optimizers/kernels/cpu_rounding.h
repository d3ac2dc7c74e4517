/* State and weights of 16 bits, for one instruction set; included by cpu_sweeps.h.

   bf16 is the upper half of fp32. What is rounded stochastically has 16 random bits added to the lower half, which is
   then dropped. The random bits are SplitMix64's, a function of the layer's key and γ and the position in the layer:
   split_mix.py and rounding.py are what this must agree with. */

typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
typedef uint64_t W __attribute__((vector_size(4 * LANES)));

/* The words of LANES elements, cut in two. */
typedef struct {
    U low, high;
} NAME(words);

INLINE TARGET W NAME(mixed)(W z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/* Of neighbours, of which `first` is the first one's word before it is mixed. Even and odd lanes are mixed apart: two
   shifts then bring all into order. */
INLINE TARGET NAME(words) NAME(random)(uint64_t first, uint64_t gamma)
{
    W lane;
    for (int k = 0; k < LANES / 2; k++) lane[k] = 2 * (uint64_t)k;
    W even = NAME(mixed)(lane * gamma + first), odd = NAME(mixed)(lane * gamma + (first + gamma));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return (NAME(words)){(U)((even << 32) | (odd & 0xffffffff)), (U)((even >> 32 << 32) | (odd >> 32))};
#else
    return (NAME(words)){(U)((even & 0xffffffff) | (odd << 32)), (U)((even >> 32) | (odd >> 32 << 32))};
#endif
}

/* Field 0 to 3 of 16 bits. */
INLINE TARGET U NAME(field)(NAME(words) words, int field)
{
    U half = field < 2 ? words.low : words.high;
    return field % 2 ? half >> 16 : half & 0xffff;
}

/* What to add in place of random bits to round to nearest, ties to even. */
INLINE TARGET U NAME(to_nearest)(F x) { return 0x7fff + (((U)x >> 16) & 1); }

/* As bf16 has it; a NaN whose bits would carry over into another number becomes the usual one. */
INLINE TARGET F NAME(rounded)(F x, U added)
{
    U kept = ((U)x + added) & 0xffff0000, nan = (U){0} + 0x7fc00000;
    return NAME(choose)(x != x, (F)nan, (F)kept);
}

/* `rest`, 0 or 1, fills the lanes from `count` on. */
INLINE TARGET F NAME(load_half)(const uint16_t *from, int64_t count, float rest)
{
    H x = (H){0} + (uint16_t)(rest == 1 ? 0x3f80 : 0);
    memcpy(&x, from, 2 * (size_t)count);
    return (F)(__builtin_convertvector(x, U) << 16);
}

INLINE TARGET void NAME(store_half)(F x, uint16_t *to, int64_t count)
{
    H kept = __builtin_convertvector((U)x >> 16, H);
    memcpy(to, &kept, 2 * (size_t)count);
}

/* Element-wise state, in fp32 or bf16 by a `type` that is known when this is compiled. */
INLINE TARGET F NAME(load_state)(const void *from, int64_t i, int64_t count, float rest, int type)
{
    if (type == BF16) return NAME(load_half)((const uint16_t *)from + i, count, rest);
    return NAME(load)((const float *)from + i, count, rest);
}

INLINE TARGET void NAME(store_state)(F x, void *to, int64_t i, int64_t count, int type)
{
    if (type == BF16) NAME(store_half)(x, (uint16_t *)to + i, count);
    else NAME(store)(x, (float *)to + i, count);
}

/* A state as it will be kept, of which number `place` says which random bits are its own. */
INLINE TARGET F NAME(kept)(F x, NAME(words) words, int place, int type)
{
    return type == BF16 ? NAME(rounded)(x, NAME(field)(words, place)) : x;
}

/* bf16 weights as the sums of two numbers. */
static TARGET void NAME(widen_sums)(const uint16_t *weight, const uint16_t *rest, float *tile, int64_t length)
{
    LOOP(NAME(store)(NAME(load_half)(weight + i, n, 0) + NAME(load_half)(rest + i, n, 0), tile + i, n));
}

static TARGET void NAME(narrow_sums)(const float *tile, uint16_t *weight, uint16_t *rest, int64_t length)
{
    LOOP({
        F sum = NAME(load)(tile + i, n, 0), nearest = NAME(rounded)(sum, NAME(to_nearest)(sum)), left = sum - nearest;
        NAME(store_half)(nearest, weight + i, n);
        NAME(store_half)(NAME(rounded)(left, NAME(to_nearest)(left)), rest + i, n);
    });
}

static TARGET void NAME(narrow_randomly)(
    const float *tile, uint16_t *weight, uint64_t first, uint64_t gamma, int64_t length)
{
    LOOP({
        NAME(words) words = NAME(random)(first + (uint64_t)i * gamma, gamma);
        NAME(store_half)(NAME(rounded)(NAME(load)(tile + i, n, 0), NAME(field)(words, FIELD_OF_WEIGHTS)), weight + i, n);
    });
}

static TARGET void NAME(random_words)(uint64_t first, uint64_t gamma, uint64_t *to, int64_t length)
{
    LOOP({
        NAME(words) words = NAME(random)(first + (uint64_t)i * gamma, gamma);
        for (int64_t k = 0; k < n; k++) to[i + k] = (uint64_t)words.high[k] << 32 | words.low[k];
    });
}
