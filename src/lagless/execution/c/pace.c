/* One step of PACE over all tensors: weights, gradients, moments and averages are read once and written once.

   The operations are those of lagless.updates.pulled_adamw, one by one and in its order; products must not be contracted
   with sums. Every element then has the same value whoever steps it, however the tensors are divided. */

#include <math.h>

#include "moves.h"
#include "parallel.h"

/* Tensors of a parameter: the fields of PaceRow, in its order. */
enum { WEIGHTS, GRADIENT, EXP_AVG, EXP_AVG_SQ, AVERAGE, ROWS };

#define STEP(NAME, REAL, SQRT)                                                                                  \
    MOVES(NAME, REAL)                                                                                           \
    typedef struct { /* the fields of PaceConstants, in its order */                                            \
        REAL sign, decay, first, second, correction, rate, eps, pull, ceiling, average;                         \
    } NAME##_constants;                                                                                         \
    static void NAME##_range(int64_t n, REAL *restrict theta, const REAL *restrict grad, REAL *restrict m,      \
        REAL *restrict v, REAL *restrict average, const NAME##_constants k)                                     \
    {                                                                                                           \
        const REAL eps = k.correction * k.eps;                                                                  \
        for (int64_t i = 0; i < n; i++) {                                                                       \
            const REAL g = k.sign * grad[i], before = theta[i], target = average[i];                            \
            const REAL new_m = NAME##_lerp(m[i], g, k.first), new_v = NAME##_lerp_square(v[i], g, k.second);    \
            const REAL inverse = k.correction / (SQRT(new_v) + eps), gain = k.pull * inverse;                   \
            const REAL clamped = gain > k.ceiling ? k.ceiling : gain; /* NaN stays */                           \
            const REAL after = k.decay * before - k.rate * (new_m * inverse) + clamped * (target - before);     \
            theta[i] = after;                                                                                   \
            m[i] = new_m;                                                                                       \
            v[i] = new_v;                                                                                       \
            average[i] = NAME##_lerp(target, after, k.average);                                                 \
        }                                                                                                       \
    }                                                                                                           \
    static void *NAME##_share(void *given)                                                                      \
    {                                                                                                           \
        const Share *share = given;                                                                             \
        int64_t start = 0, from, to; /* start: of the tensor */                                                 \
        for (size_t t = 0; t < share->tensors && start < share->end; start += share->sizes[t++]) {              \
            REAL *const *rows = (REAL *const *)share->addresses + ROWS * t;                                     \
            if (in_share(share, start, share->sizes[t], &from, &to) > 0)                                        \
                NAME##_range(to - from, rows[WEIGHTS] + from, rows[GRADIENT] + from, rows[EXP_AVG] + from,      \
                    rows[EXP_AVG_SQ] + from, rows[AVERAGE] + from, *(const NAME##_constants *)share->constants); \
        }                                                                                                       \
        return NULL;                                                                                            \
    }                                                                                                           \
    void NAME(size_t tensors, const int64_t *sizes, char *const *addresses, const NAME##_constants *constants,  \
        size_t threads)                                                                                         \
    {                                                                                                           \
        run_shares(NAME##_share, (Share){tensors, ROWS, sizes, addresses, constants, 0, 0}, threads);           \
    }

STEP(pace_float32, float, sqrtf)
STEP(pace_float64, double, sqrt)
