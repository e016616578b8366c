/* Several averages moved towards the live weights in one pass: weights are read once, each average read and written once.

   An element moves as by torch.lerp, whose products are contracted with sums. */

#include <math.h>

#include "parallel.h"

enum { CHUNK = 1024 }; /* elements; of the weights they stay in the nearest cache from one average to the next */

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
        int64_t start = 0, from, to; /* start: of the tensor */                                                 \
        for (size_t t = 0; t < share->tensors && start < share->end; start += share->sizes[t++]) {              \
            REAL *const *rows = (REAL *const *)share->addresses + share->rows * t;                              \
            if (in_share(share, start, share->sizes[t], &from, &to) <= 0) continue;                             \
            for (int64_t at = from; at < to; at += CHUNK)                                                       \
                for (size_t k = 1; k < share->rows; k++)                                                        \
                    NAME##_chunk(to - at < CHUNK ? to - at : CHUNK, rows[0] + at, rows[k] + at, gains[k - 1]);  \
        }                                                                                                       \
        return NULL;                                                                                            \
    }                                                                                                           \
    /* addresses: weights and `averages` averages of each tensor. */                                            \
    void NAME(size_t tensors, size_t averages, const int64_t *sizes, char *const *addresses, const REAL *gains, \
        size_t threads)                                                                                         \
    {                                                                                                           \
        run_shares(NAME##_share, (Share){tensors, averages + 1, sizes, addresses, gains, 0, 0}, threads);       \
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
