/* Calls the compiled sweeps and compares them with plain loops, on processors that Python does not run on here.
   Prints "level N: K comparisons" for each level of instructions; ends with 1 after the first difference. */

#include "cpu_kernels.c"

#include <stdio.h>
#include <stdlib.h>

#define START 3 /* elements before the layer, which belong to nobody */
#define MOST 40000
#define ROOT 0.5 /* the least that the clip takes for the root of v */

static int comparisons;
static const char *what;

static void compare(double found, double expected, double tolerance, int64_t at)
{
    comparisons++;
    if (fabs(found - expected) <= tolerance * (fabs(expected) + 1)) return; /* inputs are about 1 */
    printf("%s, element %lld: %.9g instead of %.9g\n", what, (long long)at, found, expected);
    exit(1);
}

/* Numbers about 1, the same on every machine. */
static float number(uint64_t seed, int64_t at)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15 + (uint64_t)at * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 31)) * 0x94d049bb133111eb;
    return (float)((double)(x >> 40) / 0x1p23 - 1.0);
}

typedef struct {
    int type;
    float exact[MOST + 2 * START]; /* what is stored, in fp32 */
    uint32_t stored[MOST + 2 * START];
} Tensor;

static void fill(Tensor *t, int type, uint64_t seed)
{
    t->type = type;
    for (int64_t i = 0; i < MOST + 2 * START; i++) t->exact[i] = number(seed, i);
    if (type == FP32) memcpy(t->stored, t->exact, sizeof t->exact);
    else narrow(t->exact, t->stored, type, 0, MOST + 2 * START);
    if (type != FP32) widen(t->stored, type, 0, MOST + 2 * START, t->exact);
}

static double value(const Tensor *t, int64_t at)
{
    float x;
    if (t->type == FP32) memcpy(&x, &t->stored[at], 4);
    else widen(t->stored, t->type, at, 1, &x);
    return x;
}

static Tensor weight, gradient, first, second;
static double sums[SUMS], partial[SUMS * (1 + MOST / BLOCK + 1)];
static uint8_t idle[1 + MOST / BLOCK + 1];

/* One layer in one tensor, a sweep of two threads; of Adam's forms `clipped` ones, with decay beside the direction. */
static void sweep_of(int64_t kind, int64_t length, int64_t level, int clipped)
{
    const int64_t zero = 0, start = START, first_block[] = {0, (length + BLOCK - 1) / BLOCK};
    const uint8_t weight_type = (uint8_t)weight.type, gradient_type = (uint8_t)gradient.type;
    void *const w = weight.stored, *const m = first.stored, *const v = second.stored;
    const void *const g = gradient.stored;
    const float gradient_scale = 0.5f, weight_scale = 0.25f, step = 0.125f, correction = 2.0f, decay = 0.01f;
    Sweep s = {.kind = kind, .threads = 2, .shards = 1, .layers = 1, .tensor = &zero, .start = &start,
               .length = &length, .layer = &zero, .first_block = first_block, .weight_type = &weight_type,
               .gradient_type = &gradient_type, .weight = &w, .gradient = &g, .first = &m, .second = &v,
               .gradient_scale = &gradient_scale, .weight_scale = &weight_scale, .step = &step,
               .correction1 = &correction, .correction2 = &correction, .beta1 = 0.9, .beta2 = 0.99, .gain = 0.1,
               .eps = 1e-6, .weight_decay = &decay};
    int measures = kind < MOMENTUM || (kind >= ADAM && (kind - ADAM) % 4 < 2);
    memset(sums, 0, sizeof sums);
    if (kind >= ADAM) s.idle = idle;
    if (kind >= ADAM && !clipped) s.weight_scale = NULL;
    if (clipped) s.smallest_root = ROOT;
    if (measures) s.partial = partial, s.sums = sums;
    trustratio_sweep(&s, level);
}

static void sweep(int64_t kind, int64_t length, int64_t level) { sweep_of(kind, length, level, 0); }

static void begin(int weight_type, int gradient_type, const char *name)
{
    what = name;
    fill(&weight, weight_type, 1);
    fill(&gradient, gradient_type, 2);
    fill(&first, FP32, 3);
    fill(&second, FP32, 4);
    for (int64_t i = 0; i < MOST + 2 * START; i++) second.exact[i] = fabsf(second.exact[i]);
    memcpy(second.stored, second.exact, sizeof second.exact);
}

/* Neighbours of the layer are as they were. */
static void compare_outside(int64_t length)
{
    for (int64_t i = 0; i < START; i++) {
        compare(value(&weight, i), weight.exact[i], 0, i);
        compare(value(&weight, START + length + i), weight.exact[START + length + i], 0, START + length + i);
    }
}

static void check_norms(int64_t length, int64_t level)
{
    double w = 0, g = 0;
    sweep(SUM_W_G, length, level);
    for (int64_t i = START; i < START + length; i++) {
        w += (double)weight.exact[i] * weight.exact[i];
        g += (double)gradient.exact[i] * gradient.exact[i];
    }
    compare(sums[0], w, 1e-12, 0);
    compare(sums[1], g, 1e-12, 1);
}

static double rounding(void) { return weight.type == FP32 ? 1e-6 : weight.type == FP16 ? 0x1p-10 : 0x1p-7; }

static void check_momentum(int64_t length, int64_t level)
{
    sweep(MOMENTUM, length, level);
    for (int64_t i = START; i < START + length; i++) {
        double v = 0.9 * first.exact[i] + 0.5 * gradient.exact[i] + 0.25 * weight.exact[i];
        compare(value(&first, i), v, 1e-6, i);
        compare(value(&weight, i), weight.exact[i] - 0.125 * v, rounding(), i);
    }
    compare_outside(length);
}

static void check_adam(int64_t length, int64_t level, int clipped)
{
    double directions = 0, excess = 0;
    sweep_of(ADAM + 1, length, level, clipped); /* measure and keep the moments */
    double measured = sums[2], measured_excess = sums[4];
    sweep_of(ADAM + 3, length, level, clipped); /* apply them */
    for (int64_t i = START; i < START + length; i++) {
        double g = 0.5 * gradient.exact[i], m = 0.9 * first.exact[i] + 0.1 * g, v = 0.99 * second.exact[i] + 0.01 * g * g;
        double root = sqrt(2 * v), u = 2 * m / (root + 1e-6) + 0.01 * weight.exact[i];
        double outside = clipped ? 0.25 * weight.exact[i] : 0;
        directions += u * u;
        excess += g * g / fmax(root, ROOT) / fmax(root, ROOT);
        compare(value(&first, i), m, 1e-6, i);
        compare(value(&second, i), v, 1e-6, i);
        compare(value(&weight, i), weight.exact[i] - 0.125 * u - outside, 4 * rounding(), i);
    }
    compare(measured, directions, 1e-5, 0);
    if (clipped) compare(measured_excess, excess, 1e-5, 4);
    compare_outside(length);
}

static uint64_t split_mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static void check_random_words(int64_t level)
{
    const uint64_t key = 0x0123456789abcdef, gamma = 0x9e3779b97f4a7c15;
    uint64_t words[1000];
    what = "random words";
    trustratio_random_words(key, gamma, 5, words, 1000, level);
    for (int64_t i = 0; i < 1000; i++) compare(words[i] == split_mix(key + gamma * (uint64_t)(5 + i + 1)), 1, 0, i);
}

int main(void)
{
    static const char *names[] = {"fp32", "bf16", "fp16"};
    const int64_t lengths[] = {1, 7, 100, BLOCK + 5, MOST};
    for (int64_t level = 0; level <= trustratio_best_level(); level++) {
        comparisons = 0;
        for (int type = FP32; type <= FP16; type++)
            for (int of_gradient = FP32; of_gradient <= FP16; of_gradient++)
                for (int k = 0; k < 5; k++) {
                    begin(type, of_gradient, names[type]);
                    check_norms(lengths[k], level);
                    check_momentum(lengths[k], level);
                    for (int clipped = 0; clipped < 2; clipped++) {
                        begin(type, of_gradient, names[type]);
                        check_adam(lengths[k], level, clipped);
                    }
                }
        check_random_words(level);
        printf("level %d: %d comparisons\n", (int)level, comparisons);
    }
    return 0;
}
