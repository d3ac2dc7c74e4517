/* State and weights of 16 bits, for one instruction set; included by cpu_sweeps.h.

   bf16 is the upper half of fp32. What is rounded stochastically has 16 random bits added to the lower half, which is
   then dropped. The random bits are SplitMix64's, a function of the layer's key and γ and the position in the layer:
   split_mix.py and rounding.py are what this must agree with. */

typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
typedef uint64_t W __attribute__((vector_size(4 * LANES)));

/* What some instruction sets have better instructions for than the compiler finds: widen to 32 bits; the upper halves; the
   lower or upper halves of words, even lanes' and odd lanes' in turn; the upper half of `sum`, or NaN where x is NaN. */
#ifndef WIDENED
#define WIDENED(x) __builtin_convertvector(x, U)
#define UPPER(x) __builtin_convertvector((U)(x) >> 16, H)
#endif
#ifndef LOWER_WORDS
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define LOWER_WORDS(even, odd) ((U)((even) << 32 | ((odd) & 0xffffffff)))
#define UPPER_WORDS(even, odd) ((U)((even) >> 32 << 32 | (odd) >> 32))
#else
#define LOWER_WORDS(even, odd) ((U)(((even) & 0xffffffff) | (odd) << 32))
#define UPPER_WORDS(even, odd) ((U)((even) >> 32 | (odd) >> 32 << 32))
#endif
#define UPPER_OR_NAN(x, sum) NAME(choose)((x) == (x), (F)((sum) & 0xffff0000), (F)((U){0} + 0x7fc00000))
#endif

/* The random words of neighbours, LANES at a time, before they are mixed. */
typedef struct {
    W next, gamma, stride; /* of the even lanes; to the odd ones; to the next even ones */
} NAME(stream);

/* The words of LANES elements, cut in two. */
typedef struct {
    U low, high;
} NAME(words);

INLINE TARGET NAME(stream) NAME(stream_at)(uint64_t first, uint64_t gamma)
{
    W lane;
    for (int k = 0; k < LANES / 2; k++) lane[k] = 2 * (uint64_t)k;
    return (NAME(stream)){lane * gamma + first, (W){0} + gamma, (W){0} + LANES * gamma};
}

INLINE TARGET W NAME(mixed)(W z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/* Even and odd lanes are mixed apart: that brings the halves into the order of the elements without shuffling. */
INLINE TARGET NAME(words) NAME(next)(NAME(stream) * stream)
{
    W even = NAME(mixed)(stream->next), odd = NAME(mixed)(stream->next + stream->gamma);
    stream->next += stream->stride;
    return (NAME(words)){LOWER_WORDS(even, odd), UPPER_WORDS(even, odd)};
}

/* Field 0 to 3 of 16 bits. */
INLINE TARGET U NAME(field)(NAME(words) words, int field)
{
    U half = field < 2 ? words.low : words.high;
    return field % 2 ? half >> 16 : half & 0xffff;
}

/* What to add in place of random bits to round to nearest, ties to even. */
INLINE TARGET U NAME(to_nearest)(F x) { return 0x7fff + (((U)x >> 16) & 1); }

INLINE TARGET F NAME(rounded)(F x, U added) { return UPPER_OR_NAN(x, (U)x + added); }

INLINE TARGET F NAME(load_half)(const uint16_t *from, int64_t count)
{
    H x = (H){0};
    memcpy(&x, from, 2 * (size_t)count);
    return (F)(WIDENED(x) << 16);
}

INLINE TARGET void NAME(store_half)(F x, uint16_t *to, int64_t count)
{
    H kept = UPPER(x);
    memcpy(to, &kept, 2 * (size_t)count);
}

/* Element-wise state, in fp32 or bf16 by a `type` that is known when this is compiled. */
INLINE TARGET F NAME(read_state)(const void *from, int64_t i, int64_t count, float rest, int type)
{
    if (type == FP32) return NAME(read)((const float *)from, i, count, rest);
    __builtin_prefetch((const uint16_t *)from + i + AHEAD);
    return NAME(load_half)((const uint16_t *)from + i, count); /* whoever adds up leaves the lanes behind out */
}

INLINE TARGET void NAME(write_state)(F x, void *to, int64_t i, int64_t count, int type)
{
    if (type == BF16) NAME(store_half)(x, (uint16_t *)to + i, count);
    else NAME(store)(x, (float *)to + i, count);
}

/* A state as it will be kept, of which number `place` says which random bits are its own. */
INLINE TARGET F NAME(kept)(F x, NAME(words) words, int place, int type)
{
    return type == BF16 ? NAME(rounded)(x, NAME(field)(words, place)) : x;
}

INLINE TARGET F NAME(nearest)(F x) { return NAME(rounded)(x, NAME(to_nearest)(x)); }

INLINE TARGET F NAME(finite)(F x) { return NAME(choose)(x - x == (F){0}, x, (F){0}); }

/* bf16 weights as the sums of two numbers; a rest beside which the weight is not the nearest is of other weights. */
static TARGET void NAME(widen_sums)(const uint16_t *weight, const uint16_t *rest, float *tile, int64_t length)
{
    LOOP({
        F w = NAME(load_half)(weight + i, n), sum = w + NAME(load_half)(rest + i, n);
        NAME(store)(NAME(choose)(NAME(nearest)(sum) == w, sum, w), tile + i, n);
    });
}

/* A rest that is rounded to half a distance lies as near to the next weight, which may be the even one. */
static TARGET void NAME(narrow_sums)(
    const float *tile, uint16_t *weight, uint16_t *rest, NAME(stream) random, int64_t length)
{
    LOOP({
        U added = NAME(field)(NAME(next)(&random), FIELD_OF_WEIGHTS);
        F sum = NAME(load)(tile + i, n, 0), nearest = NAME(nearest)(sum);
        F kept = nearest + NAME(rounded)(NAME(finite)(sum - nearest), added), w = NAME(nearest)(kept);
        NAME(store_half)(w, weight + i, n);
        NAME(store_half)(NAME(finite)(kept - w), rest + i, n);
    });
}

static TARGET void NAME(narrow_randomly)(const float *tile, uint16_t *weight, NAME(stream) random, int64_t length)
{
    LOOP({
        U added = NAME(field)(NAME(next)(&random), FIELD_OF_WEIGHTS);
        NAME(store_half)(NAME(rounded)(NAME(load)(tile + i, n, 0), added), weight + i, n);
    });
}

static TARGET void NAME(random_words)(uint64_t first, uint64_t gamma, uint64_t *to, int64_t length)
{
    NAME(stream) random = NAME(stream_at)(first, gamma);
    LOOP({
        NAME(words) words = NAME(next)(&random);
        for (int64_t k = 0; k < n; k++) to[i + k] = (uint64_t)words.high[k] << 32 | words.low[k];
    });
}
