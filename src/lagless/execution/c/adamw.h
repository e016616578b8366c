/* The moments of AdamW and what it divides by, as lagless.updates has them: products are not contracted. */

#include "moves.h"

#define ADAMW(NAME, REAL, SQRT)                                                                                 \
    MOVES(NAME, REAL)                                                                                           \
    typedef struct { /* of the numbers of a step, those that AdamW takes */                                     \
        REAL sign, decay, first, second, correction, rate, eps;                                                 \
    } NAME##_adamw;                                                                                             \
    /* Move the moments by the gradient g. Returns 1/D. */                                                      \
    static inline REAL NAME##_moments(REAL g, REAL *m, REAL *v, const NAME##_adamw k)                           \
    {                                                                                                           \
        *m = NAME##_lerp(*m, g, k.first);                                                                       \
        *v = NAME##_lerp_square(*v, g, k.second);                                                               \
        return k.correction / (SQRT(*v) + k.correction * k.eps);                                                \
    }
