/* One step of PACE over all tensors: weights, gradients, moments and averages are read once and written once.

   The operations are those of lagless.updates.pulled_adamw, one by one and in its order; products must not be contracted
   with sums. Every element then has the same value whoever steps it, however the tensors are divided. */

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { THREADS = 256, ALIGNED = 64 };

/* One thread's elements, counted through all tensors in order. */
typedef struct {
    size_t tensors;
    const int64_t *sizes;
    char *const *addresses; /* (tensors, 5): weights, gradient, first moment, second moment, average */
    const void *constants;  /* PaceConstants */
    int64_t begin, end;
} Share;

#define STEP(NAME, REAL, SQRT)                                                                                  \
    static void NAME##_range(int64_t n, REAL *restrict theta, const REAL *restrict grad, REAL *restrict m,      \
        REAL *restrict v, REAL *restrict average, const REAL *k)                                                \
    {                                                                                                           \
        const REAL sign = k[0], decay = k[1], first = k[2], second = k[3], correction = k[4], rate = k[5];      \
        const REAL eps = correction * k[6], pull = k[7], ceiling = k[8], weight = k[9];                         \
        for (int64_t i = 0; i < n; i++) {                                                                       \
            const REAL g = sign * grad[i], before = theta[i], target = average[i];                              \
            const REAL new_m = m[i] + first * (g - m[i]), new_v = v[i] + second * (g * g - v[i]);               \
            const REAL inverse = correction / (SQRT(new_v) + eps), gain = pull * inverse;                       \
            const REAL clamped = gain > ceiling ? ceiling : gain; /* NaN stays */                               \
            const REAL after = decay * before - rate * (new_m * inverse) + clamped * (target - before);         \
            theta[i] = after;                                                                                   \
            m[i] = new_m;                                                                                       \
            v[i] = new_v;                                                                                       \
            average[i] = target + weight * (after - target);                                                    \
        }                                                                                                       \
    }                                                                                                           \
    static void *NAME##_share(void *given)                                                                      \
    {                                                                                                           \
        const Share *share = given;                                                                             \
        int64_t start = 0; /* of the tensor */                                                                  \
        for (size_t t = 0; t < share->tensors && start < share->end; start += share->sizes[t++]) {              \
            const int64_t size = share->sizes[t];                                                               \
            const int64_t from = share->begin > start ? share->begin - start : 0;                               \
            const int64_t to = share->end - start < size ? share->end - start : size;                           \
            REAL *const *rows = (REAL *const *)share->addresses + 5 * t;                                        \
            if (from < to)                                                                                      \
                NAME##_range(to - from, rows[0] + from, rows[1] + from, rows[2] + from, rows[3] + from,         \
                    rows[4] + from, share->constants);                                                          \
        }                                                                                                       \
        return NULL;                                                                                            \
    }                                                                                                           \
    void NAME(size_t tensors, const int64_t *sizes, char *const *addresses, const void *constants, size_t threads) \
    {                                                                                                           \
        run(NAME##_share, (Share){tensors, sizes, addresses, constants, 0, 0}, threads);                        \
    }

/* Divide the elements evenly; this thread takes the last share, and those for which no thread can be started. */
static void run(void *(*work)(void *), Share all, size_t threads)
{
    Share shares[THREADS];
    pthread_t started[THREADS];
    int running[THREADS];
    int64_t total = 0, begin = 0;
    for (size_t t = 0; t < all.tensors; t++) total += all.sizes[t];
    if (threads > THREADS) threads = THREADS;
    for (size_t i = 0; i < threads; i++) {
        const int64_t even = total / (int64_t)threads * (int64_t)(i + 1);
        shares[i] = all;
        shares[i].begin = begin;
        shares[i].end = begin = i + 1 < threads ? even / ALIGNED * ALIGNED : total;
        running[i] = i + 1 < threads && pthread_create(&started[i], NULL, work, &shares[i]) == 0;
        if (!running[i]) work(&shares[i]);
    }
    for (size_t i = 0; i < threads; i++)
        if (running[i]) pthread_join(started[i], NULL);
}

STEP(pace_float32, float, sqrtf)
STEP(pace_float64, double, sqrt)
