/* One step of AdamW for one tensor, plain or leave-one-out: everything is read once and written once.

   The operations are those of lagless.updates.adam_folds with two nodes, g + d and g - d; the means of the others are
   g - d/(n - 1) and g + d/(n - 1). Products must not be contracted with sums. Every element then has the same value
   however the tensor is divided. */

#include <math.h>

#include "parallel.h"

enum { PLAIN, LEAVE_ONE_OUT, JACKKNIFE };

#define STEP(NAME, REAL, SQRT)                                                                                  \
    typedef struct {                                                                                            \
        REAL decay, rate, eps, first, second, m_old, m_new, v_old, v_new; /* as lagless calls them */           \
        REAL others, scale, largest; /* n - 1; of the sums, which become mean squares; of an update */          \
    } NAME##_numbers;                                                                                           \
    typedef struct {                                                                                            \
        int form;                                                                                               \
        const NAME##_numbers *numbers;                                                                          \
    } NAME##_given;                                                                                             \
    static inline REAL NAME##_lerp(REAL from, REAL to, REAL gain) /* exact at gains of 0 and 1 */               \
    {                                                                                                           \
        return gain < (REAL)0.5 ? from + gain * (to - from) : to - (to - from) * (1 - gain);                    \
    }                                                                                                           \
    static inline __attribute__((always_inline)) void NAME##_range(const int form, int64_t n,                   \
        REAL *restrict theta, const REAL *restrict grad, REAL *restrict m, REAL *restrict v,                    \
        const REAL *restrict squares, const NAME##_numbers k)                                                   \
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
            v[i] = NAME##_lerp(v[i], g * g, k.second);                                                          \
            theta[i] = k.decay * theta[i] - k.rate * update;                                                    \
        }                                                                                                       \
    }                                                                                                           \
    static void *NAME##_share(void *given)                                                                      \
    {                                                                                                           \
        const Share *share = given;                                                                             \
        const NAME##_given *what = share->constants;                                                            \
        const int64_t at = share->begin, n = share->end - at;                                                   \
        REAL *const *row = (REAL *const *)share->addresses;                                                     \
        REAL *theta = row[0] + at, *grad = row[1] + at, *m = row[2] + at, *v = row[3] + at;                     \
        if (what->form == PLAIN) NAME##_range(PLAIN, n, theta, grad, m, v, NULL, *what->numbers);               \
        else if (what->form == LEAVE_ONE_OUT)                                                                   \
            NAME##_range(LEAVE_ONE_OUT, n, theta, grad, m, v, row[4] + at, *what->numbers);                     \
        else NAME##_range(JACKKNIFE, n, theta, grad, m, v, row[4] + at, *what->numbers);                        \
        return NULL;                                                                                            \
    }                                                                                                           \
    /* addresses: weights, gradient, first and second moment and, unless plain, the microbatches' sum of squares */ \
    void NAME(int form, const int64_t *size, char *const *addresses, const NAME##_numbers *numbers, size_t threads) \
    {                                                                                                           \
        const NAME##_given given = {form, numbers};                                                             \
        run_shares(NAME##_share, (Share){1, form == PLAIN ? 4 : 5, size, addresses, &given, 0, 0}, threads);    \
    }

STEP(adam_float32, float, sqrtf)
STEP(adam_float64, double, sqrt)
