/* One step of PACE over all tensors: weights, gradients, moments and averages are read once and written once.

   The operations are those of lagless.updates.pulled_adamw, one by one and in its order; products must not be contracted
   with sums. Every element then has the same value whoever steps it, however the tensors are divided. */

#include <math.h>

#include "adamw.h"
#include "parallel.h"

/* Tensors of a parameter: the fields of PaceRow, in its order. */
enum { WEIGHTS, GRADIENT, EXP_AVG, EXP_AVG_SQ, AVERAGE, ROWS };

#define STEP(NAME, REAL, SQRT)                                                                                  \
    ADAMW(NAME, REAL, SQRT)                                                                                     \
    typedef struct { /* the fields of PaceConstants, in its order */                                            \
        NAME##_adamw adamw;                                                                                     \
        REAL pull, ceiling, average;                                                                            \
    } NAME##_constants;                                                                                         \
    static void NAME##_range(int64_t n, REAL *restrict theta, const REAL *restrict grad, REAL *restrict m,      \
        REAL *restrict v, REAL *restrict average, const NAME##_constants k)                                     \
    {                                                                                                           \
        for (int64_t i = 0; i < n; i++) {                                                                       \
            const REAL before = theta[i], target = average[i];                                                  \
            const REAL inverse = NAME##_moments(k.adamw.sign * grad[i], &m[i], &v[i], k.adamw);                 \
            const REAL gain = k.pull * inverse, clamped = gain > k.ceiling ? k.ceiling : gain; /* NaN stays */  \
            const REAL stepped = k.adamw.decay * before - k.adamw.rate * (m[i] * inverse);                      \
            theta[i] = stepped + clamped * (target - before);                                                   \
            average[i] = NAME##_lerp(target, theta[i], k.average);                                              \
        }                                                                                                       \
    }                                                                                                           \
    static void NAME##_at(int64_t n, REAL *const *rows, int64_t from, const NAME##_constants *k)                \
    {                                                                                                           \
        NAME##_range(n, rows[WEIGHTS] + from, rows[GRADIENT] + from, rows[EXP_AVG] + from, rows[EXP_AVG_SQ] + from, \
            rows[AVERAGE] + from, *k);                                                                          \
    }                                                                                                           \
    RUN_ROWS(NAME, REAL, ROWS)

STEP(pace_float32, float, sqrtf)
STEP(pace_float64, double, sqrt)
