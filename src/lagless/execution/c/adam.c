/* One step of AdamW for one tensor, plain or leave-one-out: everything is read once and written once.

   The operations are those of lagless.updates.adam_folds with two nodes, g + d and g - d; the means of the others are
   g - d/(n - 1) and g + d/(n - 1). Products must not be contracted with sums. Every element then has the same value
   however the tensor is divided. */

#include <math.h>

#include "moves.h"
#include "parallel.h"

enum { PLAIN, LEAVE_ONE_OUT, JACKKNIFE };

/* Tensors of a parameter: the fields of AdamRow, in its order; SQUARES unless plain. */
enum { WEIGHTS, GRADIENT, EXP_AVG, EXP_AVG_SQ, SQUARES, ROWS };

#define STEP(NAME, REAL, SQRT)                                                                                  \
    MOVES(NAME, REAL)                                                                                           \
    typedef struct { /* the fields of AdamConstants, in its order */                                            \
        REAL decay, rate, eps, first, second, m_old, m_new, v_old, v_new, others, scale, largest;               \
    } NAME##_constants;                                                                                         \
    typedef struct {                                                                                            \
        int form;                                                                                               \
        const NAME##_constants *constants;                                                                      \
    } NAME##_given;                                                                                             \
    static inline __attribute__((always_inline)) void NAME##_range(const int form, int64_t n,                   \
        REAL *restrict theta, const REAL *restrict grad, REAL *restrict m, REAL *restrict v,                    \
        const REAL *restrict squares, const NAME##_constants k)                                                 \
    {                                                                                                           \
        for (int64_t i = 0; i < n; i++) {                                                                       \
            const REAL g = grad[i], old = k.m_old * m[i], kept = k.v_old * v[i];                                \
            REAL update;                                                                                        \
            if (form == PLAIN) {                                                                                \
                update = (old + k.m_new * g) / (SQRT(kept + k.v_new * (g * g)) + k.eps);                        \
            } else {                                                                                            \
                const REAL variance = k.scale * squares[i] - g * g;                                             \
                const REAL d = SQRT(variance < 0 ? 0 : variance), near = d / k.others;                          \
                const REAL a = SQRT(kept + k.v_new * ((g - near) * (g - near))) + k.eps; /* without g + d */    \
                const REAL b = SQRT(kept + k.v_new * ((g + near) * (g + near))) + k.eps;                        \
                const REAL over_a = 1 / a, over_b = 1 / b;                                                      \
                const REAL at_a = old + k.m_new * (g + d), at_b = old + k.m_new * (g - d);                      \
                update = (at_a * over_a + at_b * over_b) / 2;                                                   \
                if (form == JACKKNIFE) {                                                                        \
                    const REAL half = (a - b) / 2, spread = half * half * k.others;                             \
                    const REAL less_a = over_a - spread * over_a * over_a * over_a;                             \
                    const REAL less_b = over_b - spread * over_b * over_b * over_b;                             \
                    const REAL corrected = (at_a * less_a + at_b * less_b) / 2;                                 \
                    update = corrected * update >= 0 ? corrected : 0;                                           \
                }                                                                                               \
            }                                                                                                   \
            update = update > k.largest ? k.largest : update < -k.largest ? -k.largest : update;                \
            m[i] = NAME##_lerp(m[i], g, k.first);                                                               \
            v[i] = NAME##_lerp_square(v[i], g, k.second);                                                       \
            theta[i] = k.decay * theta[i] - k.rate * update;                                                    \
        }                                                                                                       \
    }                                                                                                           \
    static void *NAME##_share(void *given)                                                                      \
    {                                                                                                           \
        const Share *share = given;                                                                             \
        const NAME##_given *what = share->constants;                                                            \
        const int64_t at = share->begin, n = share->end - at;                                                   \
        REAL *const *row = (REAL *const *)share->addresses;                                                     \
        REAL *theta = row[WEIGHTS] + at, *grad = row[GRADIENT] + at;                                            \
        REAL *m = row[EXP_AVG] + at, *v = row[EXP_AVG_SQ] + at;                                                 \
        if (what->form == PLAIN) NAME##_range(PLAIN, n, theta, grad, m, v, NULL, *what->constants);             \
        else if (what->form == LEAVE_ONE_OUT)                                                                   \
            NAME##_range(LEAVE_ONE_OUT, n, theta, grad, m, v, row[SQUARES] + at, *what->constants);             \
        else NAME##_range(JACKKNIFE, n, theta, grad, m, v, row[SQUARES] + at, *what->constants);                \
        return NULL;                                                                                            \
    }                                                                                                           \
    void NAME(int form, const int64_t *size, char *const *addresses, const NAME##_constants *constants, size_t threads) \
    {                                                                                                           \
        const NAME##_given given = {form, constants};                                                           \
        run_shares(NAME##_share, (Share){1, form == PLAIN ? SQUARES : ROWS, size, addresses, &given, 0, 0}, threads); \
    }

STEP(adam_float32, float, sqrtf)
STEP(adam_float64, double, sqrt)
