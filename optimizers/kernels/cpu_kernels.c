/* The sweeps of one step over weights, gradients and state on the CPU. See docs/kernels.md; cpu.py calls this.

   The arithmetic is in cpu_sweeps.h, compiled once per instruction set and chosen when the program runs. A sweep walks
   over blocks of at most BLOCK elements of one shard. Which thread takes a block does not matter: each block's sums
   have a place of their own and are added up in a fixed order, so results do not depend on the number of threads.
   Threads are those of torch's OpenMP runtime, lent for one call, or else made for it. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BLOCK 16384        /* elements; a block of four fp32 tensors stays in a core's own cache */
#define TILE 1024          /* elements that are widened at a time where weights or gradients have 16 bits */
#define AHEAD 768          /* elements from one that is computed to one that is asked for */
#define SUMS 5             /* places for sums: w, g, a direction, a second direction, c of the clip */
#define MAX_THREADS 256

enum { FP32, BF16, FP16 };
enum { TO_NEAREST, STOCHASTIC, KAHAN }; /* how bf16 weights are kept */
#define FIELD_OF_WEIGHTS 3              /* of the random bits; states have 0, 1 and 2 */

enum kind {
    SUM_G, SUM_W_G, SUM_W_G_D, SUM_W_G_GSNR, SUM_R_G,
    MOMENTUM, MOMENTUM_GSNR,
    /* Four in a row for each form with moments: measure; measure and keep the state; apply; apply, state kept. */
    ADAM, LANS = ADAM + 4, ADAM_GSNR = LANS + 4, ADAM_GSNR_MEAN = ADAM_GSNR + 4,
    BELIEF = ADAM_GSNR_MEAN + 4, BELIEF_MAX = BELIEF + 4, BELIEF_NO_ROOT = BELIEF_MAX + 4,
    BELIEF_MAX_NO_ROOT = BELIEF_NO_ROOT + 4, KINDS = BELIEF_MAX_NO_ROOT + 4
};

/* What one sweep does; cpu.py fills in the same fields. Vectors over layers have one entry per layer of the group. */
typedef struct {
    int64_t kind, threads, shards, layers, state_type, master;
    const int64_t *tensor, *start, *length, *layer; /* per shard */
    const int64_t *position;                        /* per shard, which is a run then: of its first element */
    const int64_t *first_block;                     /* per shard, and the number of blocks */
    const uint8_t *weight_type, *gradient_type;     /* per tensor */
    void *const *weight;                            /* per tensor */
    const void *const *gradient;                    /* per tensor; NULL counts as zero */
    void *const *first, *const *second, *const *third; /* per tensor: state, all of `state_type` */
    void *const *compensation;                      /* per tensor: what bf16 weights lack of the sum */
    const float *const *mean_square;                /* per tensor */
    const uint8_t *changes;                         /* per layer: whether to touch it; NULL: all */
    uint8_t *idle;                                  /* per block: its gradient was zero and its state not kept */
    double *partial;                                /* per block: SUMS sums */
    double *sums;                                   /* SUMS x layers */
    /* Vectors over layers */
    const uint64_t *key, *gamma;                    /* of random bits; NULL where nothing is rounded by them */
    const float *gradient_scale, *weight_scale, *step, *second_step, *correction1, *correction2, *correction3;
    const float *resolution, *gsnr_scale, *decay, *rate, *offset, *weight_decay, *l2, *fixed_decay; /* NULL: zero */
    double beta1, beta2, beta3, gain, eps, gsnr_floor, mean_square_factor, growth;
    double smallest_root; /* of v in the sum of c; 0 where that is not measured */
    int64_t nesterov;
} Sweep;

/* How a ratio follows from a layer's norms: `TrustRule` in updates.py. */
typedef struct {
    double coefficient, gradient, direction, constant, low, high, update_clip;
    const double *weight;   /* per layer; NULL: zero */
    const double *elements; /* per layer; NULL where nothing is clipped */
    int64_t place;       /* of the direction among the sums */
    const uint8_t *adapt; /* per layer */
    /* What it multiplies, per layer: vector = (float)(base * ratio * factor); no factor where that is NULL */
    int64_t targets;
    float *vector[2];
    const double *base[2];
    const double *factor[2];
} Rule;

/* A whole step: batches of layers that are measured, and applied while they are still in cache. */
typedef struct {
    const Sweep *measure, *apply;
    int64_t batches, rules;
    const int64_t *first_shard; /* per batch, and the number of shards; a layer's shards are in one batch */
    int64_t *measured, *ready;  /* per batch, zero at first: blocks measured; whether its layers' ratios are known */
    int64_t *taken;             /* threads x batches x 2, zero at first: blocks taken of a thread's run, per sweep */
    uint8_t *changes;           /* per layer: what `apply` looks at */
    Rule rule[2];
} Step;

typedef void (*block_function)(const Sweep *, int64_t shard, int64_t begin, int64_t count, int64_t block);

int64_t trustratio_block(void) { return BLOCK; }

/* Bytes of the second- or third-level cache of the first core, 0 where the system does not tell. */
int64_t trustratio_cache_bytes(int64_t level)
{
#ifdef _SC_LEVEL3_CACHE_SIZE
    long bytes = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
    return bytes > 0 ? bytes : 0;
#else
    (void)level;
    return 0;
#endif
}

int64_t trustratio_size(void) { return sizeof(Sweep) + sizeof(Step); }

/* Raised where a field becomes another one of the same size; cpu.py has the same number. */
int64_t trustratio_fields(void) { return 2; }

static void narrow_bf16(const float *from, uint16_t *to, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
    }
}

static void widen_bf16(const uint16_t *from, float *to, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

/* fp16 by arithmetic on bits, for processors and compilers that do not know it. */
static void widen_fp16(const uint16_t *from, float *to, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t sign = (uint32_t)(from[i] & 0x8000) << 16, bits = (uint32_t)(from[i] & 0x7fff) << 13;
        float value;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f; /* moves the exponent's offset; right for subnormal numbers too */
        memcpy(&bits, &value, 4);
        if ((from[i] & 0x7c00) == 0x7c00) bits |= 0x7f800000;
        bits |= sign;
        memcpy(to + i, &bits, 4);
    }
}

static void narrow_fp16(const float *from, uint16_t *to, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits, sign;
        memcpy(&bits, from + i, 4);
        sign = (bits >> 16) & 0x8000;
        bits &= 0x7fffffff;
        uint32_t result;
        if (bits > 0x7f800000) {
            result = 0x7e00;
        } else if (bits >= 0x477ff000) { /* 65520 and above round to infinity */
            result = 0x7c00;
        } else if (bits < 0x38800000) { /* below 2^-14: adding 0.5 rounds at 2^-24, the step of subnormal numbers */
            float value;
            memcpy(&value, &bits, 4);
            value += 0.5f;
            memcpy(&bits, &value, 4);
            result = bits - 0x3f000000;
        } else {
            result = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
        }
        to[i] = (uint16_t)(sign | result);
    }
}

static const float *widen(const void *tensor, int type, int64_t start, int64_t count, float *tile)
{
    if (type == FP32) return (const float *)tensor + start;
    if (type == BF16) widen_bf16((const uint16_t *)tensor + start, tile, count);
    else widen_fp16((const uint16_t *)tensor + start, tile, count);
    return tile;
}

static void narrow(const float *tile, void *tensor, int type, int64_t start, int64_t count)
{
    if (type == BF16) narrow_bf16(tile, (uint16_t *)tensor + start, count);
    else if (type == FP16) narrow_fp16(tile, (uint16_t *)tensor + start, count);
}

/* Whether all bytes but signs are zero. Ends at the first number of a dense gradient. */
static int all_zero(const void *tensor, int type, int64_t start, int64_t count)
{
    int64_t i = 0;
    if (type == FP32) {
        const uint32_t *bits = (const uint32_t *)tensor + start;
        for (; i + 64 <= count; i += 64) {
            uint32_t any = 0;
            for (int k = 0; k < 64; k++) any |= bits[i + k];
            if (any & 0x7fffffff) return 0;
        }
        for (; i < count; i++) if (bits[i] & 0x7fffffff) return 0;
        return 1;
    }
    const uint16_t *bits = (const uint16_t *)tensor + start;
    for (; i < count; i++) if (bits[i] & 0x7fff) return 0;
    return 1;
}

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define LANES 16
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma,avx2")))
#define SQRT(x) ((F)_mm512_sqrt_ps((__m512)(x)))
#define LOW(x) ((D)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)(x))))
#define HIGH(x) ((D)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)(x), 1)))
#define WIDENED(x) ((U)_mm512_cvtepu16_epi32((__m256i)(x)))
#define ODD_HALVES _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d, 0xb0009, 0x70005, 0x30001)
#define UPPER(x) ((H)_mm512_castsi512_si256(_mm512_permutexvar_epi16(ODD_HALVES, (__m512i)(x))))
#define LOWER_WORDS(even, odd) ((U)_mm512_mask_shuffle_epi32((__m512i)(even), 0xaaaa, (__m512i)(odd), 0xa0))
#define UPPER_WORDS(even, odd) ((U)_mm512_mask_shuffle_epi32((__m512i)(odd), 0x5555, (__m512i)(even), 0xf5))
#define IS_NUMBER(x) _mm512_cmp_ps_mask((__m512)(x), (__m512)(x), _CMP_ORD_Q)
#define UPPER_OR_NAN(x, sum)                                                                          \
    ((F)_mm512_mask_and_epi32(_mm512_set1_epi32(0x7fc00000), IS_NUMBER(x), (__m512i)(sum),            \
                              _mm512_set1_epi32((int)0xffff0000)))
#include "cpu_sweeps.h"
#define LANES 8
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define SQRT(x) ((F)_mm256_sqrt_ps((__m256)(x)))
#define LOW(x) ((D)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)(x))))
#define HIGH(x) ((D)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)(x), 1)))
#define WIDENED(x) ((U)_mm256_cvtepu16_epi32((__m128i)(x)))
#define PACKED(x) _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 8)
#define UPPER(x) ((H)_mm256_castsi256_si128(PACKED(_mm256_srli_epi32((__m256i)(x), 16))))
#include "cpu_sweeps.h"
#define LANES 4
#define NAME(x) x##_baseline
#define TARGET
#define SQRT(x) ((F)_mm_sqrt_ps((__m128)(x)))
#define LOW(x) ((D)_mm_cvtps_pd((__m128)(x)))
#define HIGH(x) ((D)_mm_cvtps_pd(_mm_movehl_ps((__m128)(x), (__m128)(x))))
#include "cpu_sweeps.h"
#elif defined(__aarch64__)
#define LANES 4
#define NAME(x) x##_baseline
#define TARGET
#define SQRT(x) ((F)vsqrtq_f32((float32x4_t)(x)))
#define LOW(x) ((D)vcvt_f64_f32(vget_low_f32((float32x4_t)(x))))
#define HIGH(x) ((D)vcvt_high_f64_f32((float32x4_t)(x)))
#include "cpu_sweeps.h"
#else
#define LANES 4
#define NAME(x) x##_baseline
#define TARGET
#define SQRT(x) ((F){sqrtf((x)[0]), sqrtf((x)[1]), sqrtf((x)[2]), sqrtf((x)[3])})
#define LOW(x) ((D){(x)[0], (x)[1]})
#define HIGH(x) ((D){(x)[2], (x)[3]})
#include "cpu_sweeps.h"
#endif

/* 0: what every processor of the architecture has, 1: AVX2, 2: AVX-512. Asked of the processor and, as to the registers that
   it saves, of the system: Zig's library answers __builtin_cpu_supports with no. */
int64_t trustratio_best_level(void)
{
#if defined(__x86_64__)
    const unsigned avx = bit_AVX | bit_FMA | bit_OSXSAVE, avx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512VL | bit_AVX512BW;
    unsigned a, b, c, d, saved, above;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & avx) != avx) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(above) : "c"(0));
    if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
    return (saved & 0xe6) == 0xe6 && (b & avx512) == avx512 ? 2 : 1;
#else
    return 0;
#endif
}

static block_function function_of(int64_t level)
{
#if defined(__x86_64__)
    if (level == 2) return block_avx512;
    if (level == 1) return block_avx2;
#endif
    (void)level;
    return block_baseline;
}

/* The random words of neighbours, for tests. `level` as above. */
void trustratio_random_words(uint64_t key, uint64_t gamma, int64_t position, uint64_t *to, int64_t count, int64_t level)
{
    uint64_t first = key + gamma * (uint64_t)(position + 1);
#if defined(__x86_64__)
    if (level == 2) random_words_avx512(first, gamma, to, count);
    if (level == 1) random_words_avx2(first, gamma, to, count);
    if (level > 0) return;
#endif
    random_words_baseline(first, gamma, to, count);
}

/* The last of several runs of blocks, of `first[0]` to `first[count]`, that begins at or before a block. */
static int64_t run_of_block(const int64_t *first, int64_t count, int64_t block)
{
    int64_t run = 0, above = count;
    while (above - run > 1) {
        int64_t middle = (run + above) / 2;
        if (first[middle] <= block) run = middle;
        else above = middle;
    }
    return run;
}

static void visit(const Sweep *s, block_function function, int64_t shard, int64_t block)
{
    if (s->changes && !s->changes[s->layer[shard]]) return;
    int64_t begin = (block - s->first_block[shard]) * BLOCK, left = s->length[shard] - begin;
    function(s, shard, begin, left < BLOCK ? left : BLOCK, block);
}

static void add_up(const Sweep *s, int64_t first_shard, int64_t end)
{
    for (int64_t shard = first_shard; shard < end; shard++)
        for (int64_t block = s->first_block[shard]; block < s->first_block[shard + 1]; block++)
            for (int k = 0; k < SUMS; k++) s->sums[k * s->layers + s->layer[shard]] += s->partial[block * SUMS + k];
}

/* Visit what is left of the blocks of some shards; returns how many were visited. Each thread has a run of the blocks,
   the same one in each sweep, since parts of a processor have caches of their own and what lies in another part's is
   slower to reach than memory. Who has finished its run helps the others. `taken` counts the blocks that were taken of
   each run, at distances of `stride`. */
static int64_t take_blocks(const Sweep *s, block_function function, int64_t first_shard, int64_t end_shard,
                           int64_t thread, int64_t threads, int64_t *taken, int64_t stride)
{
    const int64_t *first_block = s->first_block + first_shard;
    int64_t shards = end_shard - first_shard, count = first_block[shards] - first_block[0], visited = 0;
    for (int64_t k = 0; k < threads; k++) {
        int64_t owner = (thread + k) % threads, place;
        int64_t begin = first_block[0] + count * owner / threads, end = first_block[0] + count * (owner + 1) / threads;
        while ((place = __atomic_fetch_add(&taken[owner * stride], 1, __ATOMIC_RELAXED)) < end - begin) {
            /* Applying goes backwards: what was measured last is still in cache. */
            int64_t block = s->sums ? begin + place : end - 1 - place;
            visit(s, function, first_shard + run_of_block(first_block, shards, block), block);
            visited++;
        }
    }
    return visited;
}

static int64_t thread_count(const Sweep *s) { return s->threads < MAX_THREADS ? s->threads : MAX_THREADS; }

/* GOMP_parallel of the runtime that torch uses, NULL where there is none. Its threads wait for work busily after each
   of torch's operations: threads of our own would have to share their processors. */
typedef void (*parallel_function)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);
static parallel_function lent_threads;
static int64_t lent_in; /* a process: after a fork the threads are gone, and the runtime would wait for them */

void trustratio_lend_threads(parallel_function parallel, int64_t process)
{
    lent_threads = parallel;
    lent_in = process;
}

/* Run `work` in as many threads as the sweep wants, or fewer. */
static void run_threads(const Sweep *s, void (*work)(void *), void *argument)
{
    pthread_t others[MAX_THREADS];
    int64_t started = 0;
    if (lent_threads && getpid() == lent_in && thread_count(s) > 1) {
        lent_threads(work, argument, (unsigned)thread_count(s), 0);
        return;
    }
    while (started < thread_count(s) - 1 &&
           !pthread_create(&others[started], NULL, (void *(*)(void *))work, argument)) started++;
    work(argument);
    while (started) pthread_join(others[--started], NULL);
}

#define LINE 8 /* counters of 8 bytes in a cache line */

typedef struct {
    const Sweep *sweep;
    block_function function;
    int64_t *taken;
    int64_t started; /* atomic */
} SweepWork;

static void do_sweep(void *argument)
{
    SweepWork *work = argument;
    const Sweep *s = work->sweep;
    int64_t thread = __atomic_fetch_add(&work->started, 1, __ATOMIC_RELAXED);
    take_blocks(s, work->function, 0, s->shards, thread, thread_count(s), work->taken, LINE);
}

/* Run one sweep. `level` is at most what `trustratio_best_level` says. */
void trustratio_sweep(const Sweep *s, int64_t level)
{
    int64_t taken[MAX_THREADS * LINE] = {0};
    SweepWork work = {s, function_of(level), taken, 0};
    if (s->partial) memset(s->partial, 0, sizeof(double) * SUMS * (size_t)s->first_block[s->shards]);
    run_threads(s, do_sweep, &work);
    if (s->sums) add_up(s, 0, s->shards);
}

/* In the same order as in updates.py; each product is rounded on its own, never contracted with the sum. */
static double ratio_of_norms(const Rule *r, int64_t layer, double w, double g, double direction)
{
    if (!r->adapt[layer]) return 1;
    double weight = r->weight ? r->weight[layer] : 0;
    volatile double of_weight = weight * sqrt(w), of_gradient = r->gradient * sqrt(g);
    volatile double of_direction = r->direction * sqrt(direction);
    double numerator = r->coefficient * sqrt(w), denominator = 0, ratio = 1;
    if (weight != 0) denominator += of_weight;
    if (r->gradient != 0) denominator += of_gradient;
    if (r->direction != 0) denominator += of_direction;
    denominator += r->constant;
    if (g != 0 && numerator != 0 && denominator != 0) ratio = numerator / denominator;
    return ratio < r->low ? r->low : ratio > r->high ? r->high : ratio;
}

double trustratio_ratio(const Rule *r, int64_t layer, double w, double g, double direction, double c)
{
    double ratio = ratio_of_norms(r, layer, w, g, direction);
    if (!r->elements) return ratio;
    double excess = sqrt(c / r->elements[layer]) / r->update_clip;
    return excess <= 1 ? ratio : ratio / excess; /* NaN stays NaN */
}

static float as_float(double x)
{
    const double largest = 0x1.fffffep127;
    return (float)(x < -largest ? -largest : x > largest ? largest : x);
}

/* Everything that the layers of a measured batch need for `apply`. */
static void rule_on(const Step *step, int64_t batch)
{
    const Sweep *s = step->measure;
    add_up(s, step->first_shard[batch], step->first_shard[batch + 1]);
    for (int64_t shard = step->first_shard[batch]; shard < step->first_shard[batch + 1]; shard++) {
        int64_t layer = s->layer[shard];
        double w = s->sums[layer], g = s->sums[s->layers + layer], c = s->sums[4 * s->layers + layer];
        step->changes[layer] = (!s->changes || s->changes[layer]) && g != 0;
        for (const Rule *r = step->rule; r < step->rule + step->rules; r++) {
            double ratio = trustratio_ratio(r, layer, w, g, s->sums[r->place * s->layers + layer], c);
            for (int64_t k = 0; k < r->targets; k++)
                r->vector[k][layer] = as_float(r->base[k][layer] * ratio * (r->factor[k] ? r->factor[k][layer] : 1));
        }
    }
}

typedef struct {
    const Step *step;
    block_function function;
    int64_t started; /* atomic */
} StepWork;

/* Batch by batch: measure its blocks, and apply them once the last is measured, by whoever is at it. */
static void do_step(void *argument)
{
    StepWork *work = argument;
    const Step *step = work->step;
    const Sweep *s = step->measure;
    int64_t threads = thread_count(s), thread = __atomic_fetch_add(&work->started, 1, __ATOMIC_RELAXED);
    for (int64_t batch = 0; batch < step->batches; batch++) {
        int64_t first = step->first_shard[batch], end = step->first_shard[batch + 1];
        int64_t *taken = step->taken + 2 * batch, stride = 2 * step->batches;
        int64_t measured = take_blocks(s, work->function, first, end, thread, threads, taken, stride);
        int64_t all = s->first_block[end] - s->first_block[first];
        if (measured && __atomic_add_fetch(&step->measured[batch], measured, __ATOMIC_ACQ_REL) == all) {
            rule_on(step, batch);
            __atomic_store_n(&step->ready[batch], 1, __ATOMIC_RELEASE);
        }
        for (int turns = 0; !__atomic_load_n(&step->ready[batch], __ATOMIC_ACQUIRE); turns++)
            if (turns > 10000) sched_yield(); /* another program may have the other's core */
        take_blocks(step->apply, work->function, first, end, thread, threads, taken + 1, stride);
    }
}

/* Run a whole step of layers that are complete here. `level` as above. */
void trustratio_step(const Step *step, int64_t level)
{
    const Sweep *s = step->measure;
    StepWork work = {step, function_of(level), 0};
    memset(s->partial, 0, sizeof(double) * SUMS * (size_t)s->first_block[s->shards]);
    run_threads(s, do_step, &work);
}
