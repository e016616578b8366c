/* Averages moved by one step, as lagless.updates.lerp and lerp_square move them; products are not contracted. */

#define MOVES(NAME, REAL)                                                                                       \
    static inline REAL NAME##_lerp(REAL start, REAL end, REAL gain)                                             \
    {                                                                                                           \
        if (gain == 0) return start;                                                                            \
        if (gain == 1) return end;                                                                              \
        return gain < (REAL)0.5 ? start + gain * (end - start) : end - (1 - gain) * (end - start);              \
    }                                                                                                           \
    static inline REAL NAME##_lerp_square(REAL start, REAL root, REAL gain)                                     \
    {                                                                                                           \
        const REAL moved = NAME##_lerp(start, root * root, gain);                                               \
        return moved - moved == 0 ? moved : (1 - gain) * start + gain * root * root; /* NaN and infinity differ */ \
    }
