/* One step of PACE over all tensors: weights, gradients, moments and averages are read once and written once.

   The operations are those of lagless.updates.pulled_adamw, one by one and in its order; products must not be contracted
   with sums. Every element then has the same value whoever steps it, however the tensors are divided. */

#include <math.h>

#include "parallel.h"

enum { ROWS = 5 }; /* of a tensor: weights, gradient, first moment, second moment, average */

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
            average[i] = weight == 0 ? target : target + weight * (after - target);                             \
        }                                                                                                       \
    }                                                                                                           \
    static void *NAME##_share(void *given)                                                                      \
    {                                                                                                           \
        const Share *share = given;                                                                             \
        int64_t start = 0, from, to; /* start: of the tensor */                                                 \
        for (size_t t = 0; t < share->tensors && start < share->end; start += share->sizes[t++]) {              \
            REAL *const *rows = (REAL *const *)share->addresses + ROWS * t;                                     \
            if (in_share(share, start, share->sizes[t], &from, &to) > 0)                                        \
                NAME##_range(to - from, rows[0] + from, rows[1] + from, rows[2] + from, rows[3] + from,         \
                    rows[4] + from, share->constants);                                                          \
        }                                                                                                       \
        return NULL;                                                                                            \
    }                                                                                                           \
    /* constants: PaceConstants */                                                                              \
    void NAME(size_t tensors, const int64_t *sizes, char *const *addresses, const REAL *constants, size_t threads) \
    {                                                                                                           \
        run_shares(NAME##_share, (Share){tensors, ROWS, sizes, addresses, constants, 0, 0}, threads);           \
    }

STEP(pace_float32, float, sqrtf)
STEP(pace_float64, double, sqrt)
