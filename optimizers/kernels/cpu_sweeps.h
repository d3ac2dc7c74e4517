/* The arithmetic of the sweeps, for one instruction set. Included by cpu_kernels.c with LANES, NAME, TARGET, SQRT, and LOW
   and HIGH, which make fp64 of the first and the second half of the lanes.

   updates.py is what these formulas must agree with. Elements are fp32; squares are taken and added in fp64. */

#define F NAME(floats)
#define I NAME(ints)
#define D NAME(doubles)
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

INLINE TARGET void NAME(store)(F x, float *to, int64_t count) { memcpy(to, &x, 4 * (size_t)count); }

INLINE TARGET F NAME(choose)(I condition, F a, F b) { return (F)((condition & (I)a) | (~condition & (I)b)); }

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
    F decay, rate, offset, growth, l2, fixed_decay;
    F beta1, beta2, beta3, gain1, gain2, gain3, eps, weight_decay, gsnr_floor, mean_square_factor;
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
        .l2 = NAME(all)(s->l2),
        .fixed_decay = NAME(all)(s->fixed_decay),
        .beta1 = NAME(all)(s->beta1),
        .beta2 = NAME(all)(s->beta2),
        .beta3 = NAME(all)(s->beta3),
        .gain1 = NAME(all)(s->gain),
        .gain2 = NAME(all)(1 - s->beta2),
        .gain3 = NAME(all)(1 - s->beta3),
        .eps = NAME(all)(s->eps),
        .weight_decay = NAME(all)(s->weight_decay),
        .gsnr_floor = NAME(all)(s->gsnr_floor),
        .mean_square_factor = NAME(all)(s->mean_square_factor),
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
    float *w, *first, *second, *third;
    int64_t layer;
} NAME(tile);

/* The loops below call these with a constant kind, so that only what it needs is left of them. Elements past `count`
   are padding that adds nothing to a sum. */

INLINE TARGET void NAME(sum_lanes)(const NAME(numbers) * c, const NAME(tile) * t, int64_t i, int64_t count, int kind, ACC *sums)
{
    F g = NAME(load)(t->g + i, count, 0);
    if (kind == SUM_R_G) NAME(add)(sums, 2, NAME(raw_gsnr)(c, g, NAME(load)(t->mean_square + i, count, 0)), 0);
    if (kind == SUM_W_G_GSNR) g *= NAME(gsnr)(c, g, NAME(load)(t->mean_square + i, count, 0));
    NAME(add)(sums, 1, g, 1);
    if (kind == SUM_G || kind == SUM_R_G) return;
    F w = NAME(load)(t->w + i, count, 0);
    NAME(add)(sums, 0, w, 1);
    if (kind == SUM_W_G_D) NAME(add)(sums, 2, g + c->weight_decay * w, 1);
}

INLINE TARGET void NAME(momentum_lanes)(const NAME(numbers) * c, const NAME(tile) * t, int64_t i, int64_t count, int gsnr)
{
    F g = NAME(load)(t->g + i, count, 0), w = NAME(load)(t->w + i, count, 0);
    if (gsnr) g *= NAME(gsnr)(c, g, NAME(load)(t->mean_square + i, count, 0));
    F change = c->gradient_scale * g + c->weight_scale * w;
    if (t->first) {
        F v = c->beta1 * NAME(load)(t->first + i, count, 0) + change;
        NAME(store)(v, t->first + i, count);
        change = c->nesterov ? change + c->beta1 * v : v;
    }
    NAME(store)(w - c->step * change, t->w + i, count);
}

INLINE TARGET void NAME(adam_lanes)(
    const NAME(numbers) * c, const NAME(tile) * t, int64_t i, int64_t count, int form, int fresh, int keep, int apply, ACC *sums)
{
    F w = NAME(load)(t->w + i, count, 0), m = NAME(load)(t->first + i, count, 0);
    F v = NAME(load)(t->second + i, count, 1), g = (F){0};
    if (fresh || form == LANS) g = NAME(load)(t->g + i, count, 0);
    if (!apply) NAME(add)(sums, 1, g, 1);
    if (fresh) {
        F scaled = g * c->gradient_scale, adapted = scaled;
        if (form == ADAM_GSNR || form == ADAM_GSNR_MEAN) {
            F r = NAME(gsnr)(c, g, NAME(load)(t->mean_square + i, count, 0));
            F p = c->beta3 * NAME(load)(t->third + i, count, 0) + c->gain3 * r;
            if (keep) NAME(store)(p, t->third + i, count);
            adapted = p * c->correction3 * scaled;
        }
        F second = form == ADAM_GSNR_MEAN ? scaled : adapted;
        m = c->beta1 * m + c->gain1 * adapted;
        v = c->beta2 * v + c->gain2 * (second * second);
        if (keep) NAME(store)(m, t->first + i, count);
        if (keep) NAME(store)(v, t->second + i, count);
    }
    F denominator = SQRT(v * c->correction2) + c->eps;
    F u = m * c->correction1 / denominator + c->weight_decay * w, of_gradient = u;
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
    NAME(store)(w - change, t->w + i, count);
}

INLINE TARGET void NAME(belief_lanes)(
    const NAME(numbers) * c, const NAME(tile) * t, int64_t i, int64_t count, int form, int fresh, int keep, int apply, ACC *sums)
{
    int maximum = form == BELIEF_MAX || form == BELIEF_MAX_NO_ROOT, root = form == BELIEF || form == BELIEF_MAX;
    F w = NAME(load)(t->w + i, count, 0), m = NAME(load)(t->first + i, count, 0);
    F s = NAME(load)(t->second + i, count, 1), g = fresh || !apply ? NAME(load)(t->g + i, count, 0) : (F){0};
    F largest = maximum ? NAME(load)(t->third + i, count, 1) : s;
    if (!apply) NAME(add)(sums, 1, g, 1);
    if (fresh) {
        g += c->l2 * w;
        F surprise = c->beta1 * (g - m);
        m = c->beta1 * m + c->gain1 * g;
        s = c->decay * s + c->rate * (surprise * surprise) + c->growth;
        largest = maximum ? NAME(choose)(largest >= s, largest, s) : s; /* NaN stays NaN */
        if (keep) NAME(store)(m, t->first + i, count);
        if (keep) NAME(store)(s, t->second + i, count);
        if (keep && maximum) NAME(store)(largest, t->third + i, count);
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

#define LOOP(CALL)                                        \
    do {                                                  \
        int64_t i = 0;                                    \
        for (int64_t n = LANES; i + LANES <= length; i += LANES) { CALL; } \
        int64_t n = length - i;                           \
        if (n) { CALL; }                                  \
    } while (0)

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

TILE_FUNCTION(tile_MOMENTUM, NAME(momentum_lanes)(&c, &t, i, n, 0))
TILE_FUNCTION(tile_MOMENTUM_GSNR, NAME(momentum_lanes)(&c, &t, i, n, 1))

#define MOMENT_FUNCTIONS(FORM, LANES_OF)                                                     \
    TILE_FUNCTION(measure_##FORM, LANES_OF(&c, &t, i, n, FORM, 1, 0, 0, &sums))               \
    TILE_FUNCTION(measure_and_keep_##FORM, LANES_OF(&c, &t, i, n, FORM, 1, 1, 0, &sums))      \
    TILE_FUNCTION(apply_##FORM, LANES_OF(&c, &t, i, n, FORM, 1, 1, 1, &sums))                 \
    TILE_FUNCTION(apply_kept_##FORM, LANES_OF(&c, &t, i, n, FORM, 0, 0, 1, &sums))
MOMENT_FUNCTIONS(ADAM, NAME(adam_lanes))
MOMENT_FUNCTIONS(LANS, NAME(adam_lanes))
MOMENT_FUNCTIONS(ADAM_GSNR, NAME(adam_lanes))
MOMENT_FUNCTIONS(ADAM_GSNR_MEAN, NAME(adam_lanes))
MOMENT_FUNCTIONS(BELIEF, NAME(belief_lanes))
MOMENT_FUNCTIONS(BELIEF_MAX, NAME(belief_lanes))
MOMENT_FUNCTIONS(BELIEF_NO_ROOT, NAME(belief_lanes))
MOMENT_FUNCTIONS(BELIEF_MAX_NO_ROOT, NAME(belief_lanes))

typedef void (*NAME(tile_function))(const Sweep *, const NAME(tile) *, int64_t, ACC *);

#define MOMENT_ENTRIES(FORM)                                                                 \
    [FORM] = NAME(measure_##FORM), [FORM + 1] = NAME(measure_and_keep_##FORM),             \
    [FORM + 2] = NAME(apply_##FORM), [FORM + 3] = NAME(apply_kept_##FORM)

static const NAME(tile_function) NAME(tile_functions)[KINDS] = {
    [SUM_G] = NAME(tile_SUM_G),
    [SUM_W_G] = NAME(tile_SUM_W_G),
    [SUM_W_G_D] = NAME(tile_SUM_W_G_D),
    [SUM_W_G_GSNR] = NAME(tile_SUM_W_G_GSNR),
    [SUM_R_G] = NAME(tile_SUM_R_G),
    [MOMENTUM] = NAME(tile_MOMENTUM),
    [MOMENTUM_GSNR] = NAME(tile_MOMENTUM_GSNR),
    MOMENT_ENTRIES(ADAM),
    MOMENT_ENTRIES(LANS),
    MOMENT_ENTRIES(ADAM_GSNR),
    MOMENT_ENTRIES(ADAM_GSNR_MEAN),
    MOMENT_ENTRIES(BELIEF),
    MOMENT_ENTRIES(BELIEF_MAX),
    MOMENT_ENTRIES(BELIEF_NO_ROOT),
    MOMENT_ENTRIES(BELIEF_MAX_NO_ROOT),
};

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

static TARGET void NAME(block)(const Sweep *s, int64_t shard, int64_t begin, int64_t count, int64_t block)
{
    float weights[TILE], gradients[TILE];
    int64_t tensor = s->tensor[shard], start = s->start[shard] + begin;
    int weight_type = s->weight_type[tensor], gradient_type = s->gradient_type[tensor];
    const void *gradient = s->gradient[tensor];
    int measures_and_keeps = s->kind >= ADAM && (s->kind - ADAM) % 4 == 1;
    int zero = measures_and_keeps && (!gradient || all_zero(gradient, gradient_type, start, count));
    int64_t kind = NAME(kind_of_block)(s, block, zero);
    NAME(tile_function) function = NAME(tile_functions)[kind];
    int writes = kind == MOMENTUM || kind == MOMENTUM_GSNR || (kind >= ADAM && (kind - ADAM) % 4 >= 2);
    int64_t step = weight_type == FP32 && gradient && gradient_type == FP32 ? BLOCK : TILE;
    ACC total;
    memset(&total, 0, sizeof total);
    if (!gradient) memset(gradients, 0, sizeof gradients);
    for (int64_t done = 0; done < count; done += step) {
        int64_t length = count - done < step ? count - done : step, at = start + done;
        NAME(tile) tile = {
            .g = gradient ? widen(gradient, gradient_type, at, length, gradients) : gradients,
            .mean_square = s->mean_square ? s->mean_square[tensor] + at : NULL,
            .w = (float *)widen(s->weight[tensor], weight_type, at, length, weights),
            .first = s->first ? s->first[tensor] + at : NULL,
            .second = s->second ? s->second[tensor] + at : NULL,
            .third = s->third ? s->third[tensor] + at : NULL,
            .layer = s->layer[shard],
        };
        function(s, &tile, length, &total);
        if (writes) narrow(tile.w, s->weight[tensor], weight_type, at, length);
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
#undef ACC
#undef LOOP
#undef TILE_FUNCTION
#undef SUM_FUNCTION
#undef MOMENT_FUNCTIONS
#undef MOMENT_ENTRIES
#undef LANES
#undef NAME
#undef TARGET
#undef SQRT
#undef LOW
#undef HIGH
