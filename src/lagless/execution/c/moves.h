/* Averages moved by one step, as lagless.updates.lerp and lerp_square move them; products are not contracted.

   Both values of every condition are computed before one is chosen: a compiler vectorizes no loop with branches in it. */

#define MOVES(NAME, REAL)                                                                                       \
    static inline REAL NAME##_lerp(REAL start, REAL end, REAL gain)                                             \
    {                                                                                                           \
        const REAL way = end - start, near = start + gain * way, far = end - (1 - gain) * way;                  \
        const REAL moved = gain < (REAL)0.5 ? near : far, begun = gain == 0 ? start : moved;                    \
        return gain == 1 ? end : begun;                                                                         \
    }                                                                                                           \
    static inline REAL NAME##_lerp_square(REAL start, REAL root, REAL gain)                                     \
    {                                                                                                           \
        const REAL moved = NAME##_lerp(start, root * root, gain);                                               \
        const REAL apart = (1 - gain) * start + gain * root * root;                                             \
        return moved - moved == 0 ? moved : apart; /* NaN and infinity differ */                                \
    }
