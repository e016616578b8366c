/* Several averages moved towards the live weights in one pass: weights are read once, each average read and written once.

   An element moves as by torch.lerp, whose products are contracted with sums. Where there is room for the low bits of a
   float average, it moves as lerp_low_ of _low_bits.py does it, operation by operation: compile without contraction. */

#include <math.h>

#include "parallel.h"

enum { CHUNK = 1024 }; /* elements; of the weights they stay in the nearest cache from one average to the next */

#define UNIT 0x1p-39f
#define TINY 0x1p-126f

static void lerp_low(int64_t n, const float *restrict live, float *restrict average, int16_t *restrict low, float gain)
{
    for (int64_t i = 0; i < n; i++) {
        const float before = average[i], rest = (float)low[i] * (before * UNIT + TINY);
        const float change = ((live[i] - before) - rest) * gain + rest, after = before + change;
        float left = rintf((change - (after - before)) / (after * UNIT + TINY));
        left = left > -32767.0f ? left : -32767.0f; /* also of a NaN, which no integer can hold */
        left = left < 32767.0f ? left : 32767.0f;
        average[i] = after;
        low[i] = (int16_t)(int32_t)left;
    }
}

#define LERP(NAME, REAL, FMA)                                                                                   \
    static void NAME##_chunk(int64_t n, const REAL *restrict live, REAL *restrict average, REAL gain)           \
    {                                                                                                           \
        if (gain < (REAL)0.5)                                                                                   \
            for (int64_t i = 0; i < n; i++) average[i] = FMA(gain, live[i] - average[i], average[i]);           \
        else                                                                                                    \
            for (int64_t i = 0; i < n; i++) average[i] = FMA(gain - 1, live[i] - average[i], live[i]);          \
    }                                                                                                           \
    static void *NAME##_share(void *given)                                                                      \
    {                                                                                                           \
        const Share *share = given;                                                                             \
        const REAL *gains = share->constants;                                                                   \
        const size_t averages = (share->rows - 1) / 2;                                                          \
        int64_t start = 0, from, to; /* start: of the tensor */                                                 \
        for (size_t t = 0; t < share->tensors && start < share->end; start += share->sizes[t++]) {              \
            char *const *rows = share->addresses + share->rows * t;                                             \
            if (in_share(share, start, share->sizes[t], &from, &to) <= 0) continue;                             \
            for (int64_t at = from; at < to; at += CHUNK) {                                                     \
                const int64_t n = to - at < CHUNK ? to - at : CHUNK;                                            \
                const REAL *live = (const REAL *)rows[0] + at;                                                  \
                for (size_t k = 0; k < averages; k++) {                                                         \
                    REAL *average = (REAL *)rows[1 + k] + at;                                                   \
                    int16_t *low = (int16_t *)rows[1 + averages + k];                                           \
                    if (sizeof(REAL) == sizeof(float) && low)                                                   \
                        lerp_low(n, (const float *)live, (float *)average, low + at, (float)gains[k]);          \
                    else                                                                                        \
                        NAME##_chunk(n, live, average, gains[k]);                                               \
                }                                                                                               \
            }                                                                                                   \
        }                                                                                                       \
        return NULL;                                                                                            \
    }                                                                                                           \
    /* addresses: weights, `averages` averages and as many low bits (0 where none are kept) of each tensor. */  \
    void NAME(size_t tensors, size_t averages, const int64_t *sizes, char *const *addresses, const REAL *gains, \
        size_t threads)                                                                                         \
    {                                                                                                           \
        run_shares(NAME##_share, (Share){tensors, 1 + 2 * averages, sizes, addresses, gains, 0, 0}, threads);   \
    }

#if defined(__FMA__) || defined(__aarch64__)
#define FMA32 fmaf
#define FMA64 fma
#else /* a call for each element would be slow */
#define FMA32(a, b, c) ((a) * (b) + (c))
#define FMA64(a, b, c) ((a) * (b) + (c))
#endif

LERP(lerp_float32, float, FMA32)
LERP(lerp_float64, double, FMA64)
