/* The arithmetic of the sweeps, for one instruction set. Included by cpu_kernels.c with LANES, NAME, TARGET, SQRT, and LOW
   and HIGH, which make fp64 of the first and the second half of the lanes.

   updates.py is what these formulas must agree with. Elements are fp32; squares are taken and added in fp64. */

#define F NAME(floats)
#define I NAME(ints)
#define D NAME(doubles)
#define U NAME(unsigneds)
#define H NAME(halves)
#define W NAME(longs)
#define ACC NAME(accumulators)

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef double D __attribute__((vector_size(4 * LANES)));

typedef struct {
    D low[SUMS], high[SUMS];
} ACC;

INLINE TARGET F NAME(load)(const float *from, int64_t count, float rest)
{
    F x = (F){0} + rest;
    memcpy(&x, from, 4 * (size_t)count);
    return x;
}

/* The same of a tensor. What the loop comes to later is asked for: the processor does that only as far as a page goes. */
INLINE TARGET F NAME(read)(const float *from, int64_t i, int64_t count, float rest)
{
    __builtin_prefetch(from + i + AHEAD);
    return NAME(load)(from + i, count, rest);
}

INLINE TARGET void NAME(store)(F x, float *to, int64_t count) { memcpy(to, &x, 4 * (size_t)count); }

INLINE TARGET F NAME(choose)(I condition, F a, F b) { return (F)((condition & (I)a) | (~condition & (I)b)); }

#define LOOP(...)                                         \
    do {                                                  \
        int64_t i = 0;                                    \
        for (int64_t n = LANES; i + LANES <= length; i += LANES) { __VA_ARGS__; } \
        int64_t n = length - i;                           \
        if (n) { __VA_ARGS__; }                                  \
    } while (0)

#include "cpu_rounding.h"

INLINE TARGET void NAME(add)(ACC *sums, int place, F x, int squared)
{
    D low = LOW(x), high = HIGH(x);
    sums->low[place] += squared ? low * low : low;
    sums->high[place] += squared ? high * high : high;
}

/* A layer's numbers in all lanes. A copy on the stack, which the compiler can keep in registers: for all it knows, what
   a store writes might be the sweep's own numbers. */
typedef struct {
    F gradient_scale, weight_scale, step, second_step, correction1, correction2, correction3, resolution, gsnr_scale;
    F decay, rate, offset, weight_decay, l2, fixed_decay, growth;
    F beta1, beta2, beta3, gain1, gain2, gain3, eps, gsnr_floor, mean_square_factor, smallest_root;
    int64_t nesterov;
} NAME(numbers);

INLINE TARGET F NAME(all)(double x) { return (F){0} + (float)x; }

INLINE TARGET F NAME(of_layer)(const float *vector, int64_t layer) { return NAME(all)(vector ? vector[layer] : 0); }

static TARGET NAME(numbers) NAME(numbers_of)(const Sweep *s, int64_t layer)
{
    return (NAME(numbers)){
        .gradient_scale = NAME(of_layer)(s->gradient_scale, layer),
        .weight_scale = NAME(of_layer)(s->weight_scale, layer),
        .step = NAME(of_layer)(s->step, layer),
        .second_step = NAME(of_layer)(s->second_step, layer),
        .correction1 = NAME(of_layer)(s->correction1, layer),
        .correction2 = NAME(of_layer)(s->correction2, layer),
        .correction3 = NAME(of_layer)(s->correction3, layer),
        .resolution = NAME(of_layer)(s->resolution, layer),
        .gsnr_scale = NAME(of_layer)(s->gsnr_scale, layer),
        .decay = NAME(of_layer)(s->decay, layer),
        .rate = NAME(of_layer)(s->rate, layer),
        .offset = NAME(of_layer)(s->offset, layer),
        .growth = NAME(all)(s->growth),
        .l2 = NAME(of_layer)(s->l2, layer),
        .fixed_decay = NAME(of_layer)(s->fixed_decay, layer),
        .beta1 = NAME(all)(s->beta1),
        .beta2 = NAME(all)(s->beta2),
        .beta3 = NAME(all)(s->beta3),
        .gain1 = NAME(all)(s->gain),
        .gain2 = NAME(all)(1 - s->beta2),
        .gain3 = NAME(all)(1 - s->beta3),
        .eps = NAME(all)(s->eps),
        .weight_decay = NAME(of_layer)(s->weight_decay, layer),
        .gsnr_floor = NAME(all)(s->gsnr_floor),
        .mean_square_factor = NAME(all)(s->mean_square_factor),
        .smallest_root = NAME(all)(s->smallest_root),
        .nesterov = s->nesterov,
    };
}

/* r before it is normalised; NaN stays NaN. */
INLINE TARGET F NAME(raw_gsnr)(const NAME(numbers) * c, F g, F mean_square)
{
    F zero = (F){0}, signal = g * g, variance = mean_square * c->mean_square_factor - signal;
    variance = NAME(choose)(variance < zero, zero, variance);
    return signal / (variance + signal * c->resolution + 1e-30f);
}

INLINE TARGET F NAME(gsnr)(const NAME(numbers) * c, F g, F mean_square)
{
    F one = (F){0} + 1.0f, r = NAME(raw_gsnr)(c, g, mean_square) * c->gsnr_scale;
    return NAME(choose)(r > one, one, NAME(choose)(r < c->gsnr_floor, c->gsnr_floor, r));
}

typedef struct {
    const float *g, *mean_square;
    float *w;
    void *first, *second, *third;
    NAME(stream) random;
    int64_t layer;
} NAME(tile);

/* The loops below call these with a constant kind, so that only what it needs is left of them. Elements past `count`
   are padding that adds nothing to a sum. */

INLINE TARGET void NAME(sum_lanes)(const NAME(numbers) * c, const NAME(tile) * t, int64_t i, int64_t count, int kind, ACC *sums)
{
    F g = NAME(read)(t->g, i, count, 0);
    if (kind == SUM_R_G) NAME(add)(sums, 2, NAME(raw_gsnr)(c, g, NAME(read)(t->mean_square, i, count, 0)), 0);
    if (kind == SUM_W_G_GSNR) g *= NAME(gsnr)(c, g, NAME(read)(t->mean_square, i, count, 0));
    NAME(add)(sums, 1, g, 1);
    if (kind == SUM_G || kind == SUM_R_G) return;
    F w = NAME(read)(t->w, i, count, 0);
    NAME(add)(sums, 0, w, 1);
    if (kind == SUM_W_G_D) NAME(add)(sums, 2, g + c->weight_decay * w, 1);
}

INLINE TARGET void NAME(momentum_lanes)(
    const NAME(numbers) * c, NAME(tile) * t, int64_t i, int64_t count, int gsnr, int type)
{
    F g = NAME(read)(t->g, i, count, 0), w = NAME(read)(t->w, i, count, 0);
    if (gsnr) g *= NAME(gsnr)(c, g, NAME(read)(t->mean_square, i, count, 0));
    F change = c->gradient_scale * g + c->weight_scale * w;
    if (t->first) {
        F v = c->beta1 * NAME(read_state)(t->first, i, count, 0, type) + change;
        v = NAME(kept)(v, NAME(next)(&t->random), 0, type);
        NAME(write_state)(v, t->first, i, count, type);
        change = c->nesterov ? change + c->beta1 * v : v;
    }
    NAME(store)(w - c->step * change, t->w + i, count);
}

/* With `more`, c is measured besides, and the decay beside u applied. */
INLINE TARGET void NAME(adam_lanes_and)(
    const NAME(numbers) * c, NAME(tile) * t, int64_t i, int64_t count, int form, int fresh, int keep, int apply,
    int type, ACC *sums, int more)
{
    F w = NAME(read)(t->w, i, count, 0), m = NAME(read_state)(t->first, i, count, 0, type);
    F v = NAME(read_state)(t->second, i, count, 1, type), g = (F){0}, second = g;
    if (fresh || form == LANS) g = NAME(read)(t->g, i, count, 0);
    if (!apply) NAME(add)(sums, 1, g, 1);
    if (fresh) {
        NAME(words) words = NAME(next)(&t->random);
        F scaled = g * c->gradient_scale, adapted = scaled;
        if (form == ADAM_GSNR || form == ADAM_GSNR_MEAN) {
            F r = NAME(gsnr)(c, g, NAME(read)(t->mean_square, i, count, 0));
            F p = c->beta3 * NAME(read_state)(t->third, i, count, 0, type) + c->gain3 * r;
            p = NAME(kept)(p, words, 2, type);
            if (keep) NAME(write_state)(p, t->third, i, count, type);
            adapted = p * c->correction3 * scaled;
        }
        second = form == ADAM_GSNR_MEAN ? scaled : adapted;
        m = NAME(kept)(c->beta1 * m + c->gain1 * adapted, words, 0, type);
        v = NAME(kept)(c->beta2 * v + c->gain2 * (second * second), words, 1, type);
        if (keep) NAME(write_state)(m, t->first, i, count, type);
        if (keep) NAME(write_state)(v, t->second, i, count, type);
    }
    F root = SQRT(v * c->correction2), denominator = root + c->eps;
    F u = m * c->correction1 / denominator + c->weight_decay * w, of_gradient = u;
    if (more && !apply) NAME(add)(sums, 4, second / NAME(choose)(root < c->smallest_root, c->smallest_root, root), 1);
    if (form == LANS) of_gradient = g * c->gradient_scale / denominator + c->weight_decay * w;
    if (count < LANES) { /* padding may be 0/0 */
        u = NAME(load)((const float *)&u, count, 0);
        of_gradient = NAME(load)((const float *)&of_gradient, count, 0);
    }
    if (!apply) {
        NAME(add)(sums, 0, w, 1);
        NAME(add)(sums, 2, u, 1);
        if (form == LANS) NAME(add)(sums, 3, of_gradient, 1);
        return;
    }
    F change = u * c->step;
    if (form == LANS) change += of_gradient * c->second_step;
    if (more) change += c->weight_scale * w;
    NAME(store)(w - change, t->w + i, count);
}

INLINE TARGET void NAME(adam_lanes)(
    const NAME(numbers) * c, NAME(tile) * t, int64_t i, int64_t count, int form, int fresh, int keep, int apply,
    int type, ACC *sums)
{
    NAME(adam_lanes_and)(c, t, i, count, form, fresh, keep, apply, type, sums, 0);
}

INLINE TARGET void NAME(more_lanes)(
    const NAME(numbers) * c, NAME(tile) * t, int64_t i, int64_t count, int form, int fresh, int keep, int apply,
    int type, ACC *sums)
{
    NAME(adam_lanes_and)(c, t, i, count, form, fresh, keep, apply, type, sums, 1);
}

INLINE TARGET void NAME(belief_lanes)(
    const NAME(numbers) * c, NAME(tile) * t, int64_t i, int64_t count, int form, int fresh, int keep, int apply,
    int type, ACC *sums)
{
    int maximum = form == BELIEF_MAX || form == BELIEF_MAX_NO_ROOT, root = form == BELIEF || form == BELIEF_MAX;
    F w = NAME(read)(t->w, i, count, 0), m = NAME(read_state)(t->first, i, count, 0, type);
    F s = NAME(read_state)(t->second, i, count, 1, type), g = fresh || !apply ? NAME(read)(t->g, i, count, 0) : (F){0};
    F largest = maximum ? NAME(read_state)(t->third, i, count, 1, type) : s;
    if (!apply) NAME(add)(sums, 1, g, 1);
    if (fresh) {
        NAME(words) words = NAME(next)(&t->random);
        g += c->l2 * w;
        F surprise = c->beta1 * (g - m);
        m = NAME(kept)(c->beta1 * m + c->gain1 * g, words, 0, type);
        s = NAME(kept)(c->decay * s + c->rate * (surprise * surprise) + c->growth, words, 1, type);
        largest = maximum ? NAME(choose)(largest >= s, largest, s) : s; /* NaN stays NaN */
        if (keep) NAME(write_state)(m, t->first, i, count, type);
        if (keep) NAME(write_state)(s, t->second, i, count, type);
        if (keep && maximum) NAME(write_state)(largest, t->third, i, count, type);
    }
    F scaled = largest * c->correction2, denominator = (root ? SQRT(scaled) : scaled) + c->offset;
    F u = m * c->correction1 / denominator + c->weight_decay * w;
    if (count < LANES) u = NAME(load)((const float *)&u, count, 0); /* padding may be 0/0 */
    if (!apply) {
        NAME(add)(sums, 0, w, 1);
        NAME(add)(sums, 2, u, 1);
        return;
    }
    NAME(store)(w - (u * c->step + c->fixed_decay * w), t->w + i, count);
}

#define TILE_FUNCTION(name, CALL)                                                                                    \
    static TARGET void NAME(name)(const Sweep *s, const NAME(tile) * tile, int64_t length, ACC *total)                \
    {                                                                                                                \
        NAME(tile) t = *tile;                                                                                        \
        NAME(numbers) c = NAME(numbers_of)(s, t.layer);                                                              \
        ACC sums = *total;                                                                                           \
        LOOP(CALL);                                                                                                  \
        *total = sums;                                                                                               \
    }

#define SUM_FUNCTION(KIND) TILE_FUNCTION(tile_##KIND, NAME(sum_lanes)(&c, &t, i, n, KIND, &sums))
SUM_FUNCTION(SUM_G)
SUM_FUNCTION(SUM_W_G)
SUM_FUNCTION(SUM_W_G_D)
SUM_FUNCTION(SUM_W_G_GSNR)
SUM_FUNCTION(SUM_R_G)

#define MOMENTUM_FUNCTIONS(TYPE)                                                               \
    TILE_FUNCTION(tile_MOMENTUM_##TYPE, NAME(momentum_lanes)(&c, &t, i, n, 0, TYPE))           \
    TILE_FUNCTION(tile_MOMENTUM_GSNR_##TYPE, NAME(momentum_lanes)(&c, &t, i, n, 1, TYPE))
MOMENTUM_FUNCTIONS(FP32)
MOMENTUM_FUNCTIONS(BF16)

#define MOMENT_FUNCTIONS_OF(FORM, LANES_OF, TYPE)                                                       \
    TILE_FUNCTION(measure_##FORM##_##TYPE, LANES_OF(&c, &t, i, n, FORM, 1, 0, 0, TYPE, &sums))          \
    TILE_FUNCTION(measure_and_keep_##FORM##_##TYPE, LANES_OF(&c, &t, i, n, FORM, 1, 1, 0, TYPE, &sums)) \
    TILE_FUNCTION(apply_##FORM##_##TYPE, LANES_OF(&c, &t, i, n, FORM, 1, 1, 1, TYPE, &sums))            \
    TILE_FUNCTION(apply_kept_##FORM##_##TYPE, LANES_OF(&c, &t, i, n, FORM, 0, 0, 1, TYPE, &sums))
#define MOMENT_FUNCTIONS(FORM, LANES_OF)       \
    MOMENT_FUNCTIONS_OF(FORM, LANES_OF, FP32)  \
    MOMENT_FUNCTIONS_OF(FORM, LANES_OF, BF16)
MOMENT_FUNCTIONS(ADAM, NAME(adam_lanes))
MOMENT_FUNCTIONS(LANS, NAME(adam_lanes))
MOMENT_FUNCTIONS(ADAM_GSNR, NAME(adam_lanes))
MOMENT_FUNCTIONS(ADAM_GSNR_MEAN, NAME(adam_lanes))
MOMENT_FUNCTIONS(BELIEF, NAME(belief_lanes))
MOMENT_FUNCTIONS(BELIEF_MAX, NAME(belief_lanes))
MOMENT_FUNCTIONS(BELIEF_NO_ROOT, NAME(belief_lanes))
MOMENT_FUNCTIONS(BELIEF_MAX_NO_ROOT, NAME(belief_lanes))

#define MORE_MEASURED(FORM, TYPE)                                                                             \
    TILE_FUNCTION(measure_more_##FORM##_##TYPE, NAME(more_lanes)(&c, &t, i, n, FORM, 1, 0, 0, TYPE, &sums))   \
    TILE_FUNCTION(measure_and_keep_more_##FORM##_##TYPE, NAME(more_lanes)(&c, &t, i, n, FORM, 1, 1, 0, TYPE, &sums))
#define MORE_FUNCTIONS(TYPE)                                                                                  \
    MORE_MEASURED(ADAM, TYPE)                                                                                 \
    MORE_MEASURED(LANS, TYPE)                                                                                 \
    MORE_MEASURED(ADAM_GSNR, TYPE)                                                                            \
    MORE_MEASURED(ADAM_GSNR_MEAN, TYPE)                                                                       \
    TILE_FUNCTION(apply_more_##TYPE, NAME(more_lanes)(&c, &t, i, n, ADAM, 1, 1, 1, TYPE, &sums))              \
    TILE_FUNCTION(apply_kept_more_##TYPE, NAME(more_lanes)(&c, &t, i, n, ADAM, 0, 0, 1, TYPE, &sums))
MORE_FUNCTIONS(FP32)
MORE_FUNCTIONS(BF16)

typedef void (*NAME(tile_function))(const Sweep *, const NAME(tile) *, int64_t, ACC *);

#define MOMENT_ENTRIES(FORM, TYPE)                                                                        \
    [FORM] = NAME(measure_##FORM##_##TYPE), [FORM + 1] = NAME(measure_and_keep_##FORM##_##TYPE),          \
    [FORM + 2] = NAME(apply_##FORM##_##TYPE), [FORM + 3] = NAME(apply_kept_##FORM##_##TYPE)
#define ENTRIES(TYPE)                                                                                     \
    {                                                                                                     \
        [SUM_G] = NAME(tile_SUM_G), [SUM_W_G] = NAME(tile_SUM_W_G), [SUM_W_G_D] = NAME(tile_SUM_W_G_D),   \
        [SUM_W_G_GSNR] = NAME(tile_SUM_W_G_GSNR), [SUM_R_G] = NAME(tile_SUM_R_G),                         \
        [MOMENTUM] = NAME(tile_MOMENTUM_##TYPE), [MOMENTUM_GSNR] = NAME(tile_MOMENTUM_GSNR_##TYPE),       \
        MOMENT_ENTRIES(ADAM, TYPE), MOMENT_ENTRIES(LANS, TYPE), MOMENT_ENTRIES(ADAM_GSNR, TYPE),          \
        MOMENT_ENTRIES(ADAM_GSNR_MEAN, TYPE), MOMENT_ENTRIES(BELIEF, TYPE),                               \
        MOMENT_ENTRIES(BELIEF_MAX, TYPE), MOMENT_ENTRIES(BELIEF_NO_ROOT, TYPE),                           \
        MOMENT_ENTRIES(BELIEF_MAX_NO_ROOT, TYPE),                                                         \
    }

/* By the type of the state, FP32 or BF16. */
static const NAME(tile_function) NAME(tile_functions)[2][KINDS] = {ENTRIES(FP32), ENTRIES(BF16)};

#define MORE_MEASURED_ENTRIES(FORM, TYPE) \
    [FORM] = NAME(measure_more_##FORM##_##TYPE), [FORM + 1] = NAME(measure_and_keep_more_##FORM##_##TYPE)
#define MORE_ENTRIES(TYPE)                                                                                \
    {                                                                                                     \
        MORE_MEASURED_ENTRIES(ADAM, TYPE), MORE_MEASURED_ENTRIES(LANS, TYPE),                             \
        MORE_MEASURED_ENTRIES(ADAM_GSNR, TYPE), MORE_MEASURED_ENTRIES(ADAM_GSNR_MEAN, TYPE),              \
        [ADAM + 2] = NAME(apply_more_##TYPE), [ADAM + 3] = NAME(apply_kept_more_##TYPE),                  \
    }

/* The same with what an update has besides: c, and decay beside u. */
static const NAME(tile_function) NAME(more_functions)[2][KINDS] = {MORE_ENTRIES(FP32), MORE_ENTRIES(BF16)};

/* What a kind does to a block whose state was not kept because its gradient is zero. */
INLINE int64_t NAME(kind_of_block)(const Sweep *s, int64_t block, int zero)
{
    if (s->kind < ADAM || !s->idle) return s->kind;
    int64_t mode = (s->kind - ADAM) % 4;
    if (mode == 1) {
        s->idle[block] = (uint8_t)zero;
        return zero ? s->kind - 1 : s->kind;
    }
    return mode == 3 && s->idle[block] ? s->kind - 1 : s->kind;
}

INLINE void *NAME(state_at)(void *const *tensors, int64_t tensor, int64_t at, int64_t type)
{
    return tensors ? (char *)tensors[tensor] + at * (type == BF16 ? 2 : 4) : NULL;
}

static TARGET void NAME(block)(const Sweep *s, int64_t shard, int64_t begin, int64_t count, int64_t block)
{
    float weights[TILE], gradients[TILE];
    int64_t tensor = s->tensor[shard], start = s->start[shard] + begin, layer = s->layer[shard];
    int weight_type = s->weight_type[tensor], gradient_type = s->gradient_type[tensor];
    int64_t master = weight_type == BF16 ? s->master : TO_NEAREST;
    uint16_t *rest = master == KAHAN ? (uint16_t *)s->compensation[tensor] : NULL;
    uint16_t *halves = (uint16_t *)s->weight[tensor];
    const void *gradient = s->gradient[tensor];
    int measures_and_keeps = s->kind >= ADAM && (s->kind - ADAM) % 4 == 1;
    int zero = measures_and_keeps && (!gradient || all_zero(gradient, gradient_type, start, count));
    int64_t kind = NAME(kind_of_block)(s, block, zero);
    NAME(tile_function) function = NAME(tile_functions)[s->state_type][kind];
    if (kind >= ADAM && (s->partial ? s->smallest_root > 0 : s->weight_scale != NULL))
        function = NAME(more_functions)[s->state_type][kind];
    int writes = kind == MOMENTUM || kind == MOMENTUM_GSNR || (kind >= ADAM && (kind - ADAM) % 4 >= 2);
    int64_t step = weight_type == FP32 && gradient && gradient_type == FP32 ? BLOCK : TILE;
    uint64_t gamma = s->gamma ? s->gamma[layer] : 0, word = 0;
    if (s->gamma) word = s->key[layer] + gamma * (uint64_t)(s->position[shard] + begin + 1);
    ACC total;
    memset(&total, 0, sizeof total);
    if (!gradient) memset(gradients, 0, sizeof gradients);
    for (int64_t done = 0; done < count; done += step) {
        int64_t length = count - done < step ? count - done : step, at = start + done;
        NAME(tile) tile = {
            .g = gradient ? widen(gradient, gradient_type, at, length, gradients) : gradients,
            .mean_square = s->mean_square ? s->mean_square[tensor] + at : NULL,
            .w = rest ? weights : (float *)widen(halves, weight_type, at, length, weights),
            .first = NAME(state_at)(s->first, tensor, at, s->state_type),
            .second = NAME(state_at)(s->second, tensor, at, s->state_type),
            .third = NAME(state_at)(s->third, tensor, at, s->state_type),
            .random = NAME(stream_at)(word + gamma * (uint64_t)done, gamma),
            .layer = layer,
        };
        if (rest) NAME(widen_sums)(halves + at, rest + at, weights, length);
        function(s, &tile, length, &total);
        if (!writes) continue;
        if (rest) NAME(narrow_sums)(weights, halves + at, rest + at, tile.random, length);
        else if (master == STOCHASTIC) NAME(narrow_randomly)(weights, halves + at, tile.random, length);
        else narrow(tile.w, halves, weight_type, at, length);
    }
    if (!s->partial) return;
    for (int k = 0; k < SUMS; k++) {
        double sum = 0;
        for (int lane = 0; lane < LANES / 2; lane++) sum += total.low[k][lane] + total.high[k][lane];
        s->partial[block * SUMS + k] = sum;
    }
}

#undef F
#undef I
#undef D
#undef U
#undef H
#undef W
#undef ACC
#undef LOOP
#undef TILE_FUNCTION
#undef SUM_FUNCTION
#undef MOMENTUM_FUNCTIONS
#undef MOMENT_FUNCTIONS_OF
#undef MOMENT_FUNCTIONS
#undef MOMENT_ENTRIES
#undef MORE_MEASURED
#undef MORE_FUNCTIONS
#undef MORE_MEASURED_ENTRIES
#undef MORE_ENTRIES
#undef ENTRIES
#undef LANES
#undef NAME
#undef TARGET
#undef SQRT
#undef LOW
#undef HIGH
#undef WIDENED
#undef UPPER
#undef LOWER_WORDS
#undef UPPER_WORDS
#undef UPPER_OR_NAN
