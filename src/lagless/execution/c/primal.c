/* One step of primal averaging around AdamW over all tensors: y, gradients, moments and z are read once and written once.

   The operations are those of lagless.updates.primal_adamw, one by one and in its order; products must not be contracted
   with sums. Every element then has the same value whoever steps it, however the tensors are divided. */

#include <math.h>

#include "adamw.h"
#include "parallel.h"

/* Tensors of a parameter: the fields of PrimalRow, in its order. */
enum { WEIGHTS, GRADIENT, EXP_AVG, EXP_AVG_SQ, ITERATE, ROWS };

#define STEP(NAME, REAL, SQRT)                                                                                  \
    ADAMW(NAME, REAL, SQRT)                                                                                     \
    typedef struct { /* the fields of PrimalConstants, in its order */                                          \
        NAME##_adamw adamw;                                                                                     \
        REAL ahead, decay_at_y, average, pull, interpolation;                                                   \
    } NAME##_constants;                                                                                         \
    static void NAME##_range(int64_t n, REAL *restrict y, const REAL *restrict grad, REAL *restrict m,          \
        REAL *restrict v, REAL *restrict iterate, const NAME##_constants k)                                     \
    {                                                                                                           \
        for (int64_t i = 0; i < n; i++) {                                                                       \
            const REAL x = NAME##_lerp(iterate[i], y[i], k.ahead);                                              \
            const REAL inverse = NAME##_moments(k.adamw.sign * grad[i], &m[i], &v[i], k.adamw);                 \
            const REAL start = iterate[i] - k.decay_at_y * y[i];                                                \
            const REAL z = k.adamw.decay * start - k.adamw.rate * (m[i] * inverse);                             \
            const REAL distance = NAME##_lerp(x, z, k.average) - z;                                             \
            iterate[i] = z + k.pull * distance;                                                                 \
            y[i] = iterate[i] + k.interpolation * ((1 - k.pull) * distance);                                    \
        }                                                                                                       \
    }                                                                                                           \
    static void NAME##_at(int64_t n, REAL *const *rows, int64_t from, const NAME##_constants *k)                \
    {                                                                                                           \
        NAME##_range(n, rows[WEIGHTS] + from, rows[GRADIENT] + from, rows[EXP_AVG] + from, rows[EXP_AVG_SQ] + from, \
            rows[ITERATE] + from, *k);                                                                          \
    }                                                                                                           \
    RUN_ROWS(NAME, REAL, ROWS)

STEP(primal_float32, float, sqrtf)
STEP(primal_float64, double, sqrt)
