/* Y = W X for a few short rows, on which a BLAS spends most of its time packing.

   The sums of ROWS rows and a chunk of columns stay in registers, and the chunk's X in the nearest cache. Every element
   is summed in the same order by the same operations wherever it stands, so it does not depend on the chunks. */

#include <stddef.h>

#ifdef __AVX512F__
#define BYTES 64
#define VECTORS 4
#else
#define BYTES 32
#define VECTORS 2
#endif
#define ROWS 5 /* ROWS * VECTORS sums, VECTORS pieces of X and a weight fit the registers */
#define UNROLLED _Pragma("GCC unroll 8")

/* Rows r to r + ROWS (or one row) of a chunk of `pieces` PIECEs, each of them one or more REALs. */
#define CHUNK(NAME, REAL, PIECE)                                                                                \
    static inline __attribute__((always_inline)) void NAME(const size_t rows, const size_t pieces, size_t n,    \
        const REAL *w, const REAL *x, size_t x_stride, REAL *y, size_t y_stride)                                \
    {                                                                                                           \
        const size_t lanes = sizeof(PIECE) / sizeof(REAL);                                                      \
        PIECE sum[ROWS][VECTORS];                                                                               \
        UNROLLED for (size_t r = 0; r < rows; r++)                                                              \
            UNROLLED for (size_t v = 0; v < pieces; v++) sum[r][v] = (PIECE){0};                                \
        for (size_t k = 0; k < n; k++) {                                                                        \
            PIECE piece[VECTORS];                                                                               \
            UNROLLED for (size_t v = 0; v < pieces; v++) piece[v] = *(const PIECE *)(x + k * x_stride + v * lanes); \
            UNROLLED for (size_t r = 0; r < rows; r++)                                                          \
                UNROLLED for (size_t v = 0; v < pieces; v++) sum[r][v] += w[r * n + k] * piece[v];              \
        }                                                                                                       \
        UNROLLED for (size_t r = 0; r < rows; r++)                                                              \
            UNROLLED for (size_t v = 0; v < pieces; v++) *(PIECE *)(y + r * y_stride + v * lanes) = sum[r][v];  \
    }

/* w: (g, n) without gaps; x: (n, count) and y: (g, count), their rows x_stride and y_stride elements apart. */
#define PRODUCT(NAME, REAL)                                                                                     \
    typedef REAL NAME##_vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL))));                      \
    CHUNK(NAME##_chunk, REAL, NAME##_vector)                                                                    \
    CHUNK(NAME##_column, REAL, REAL)                                                                            \
    void NAME(size_t g, size_t n, size_t count, const REAL *w, const REAL *x, size_t x_stride, REAL *y,         \
        size_t y_stride)                                                                                        \
    {                                                                                                           \
        const size_t width = VECTORS * BYTES / sizeof(REAL);                                                    \
        size_t c = 0, r;                                                                                        \
        for (; c + width <= count; c += width) {                                                                \
            for (r = 0; r + ROWS <= g; r += ROWS)                                                               \
                NAME##_chunk(ROWS, VECTORS, n, w + r * n, x + c, x_stride, y + r * y_stride + c, y_stride);     \
            for (; r < g; r++)                                                                                  \
                NAME##_chunk(1, VECTORS, n, w + r * n, x + c, x_stride, y + r * y_stride + c, y_stride);        \
        }                                                                                                       \
        for (; c < count; c++)                                                                                  \
            for (r = 0; r < g; r++)                                                                             \
                NAME##_column(1, 1, n, w + r * n, x + c, x_stride, y + r * y_stride + c, y_stride);             \
    }

PRODUCT(product_float32, float)
PRODUCT(product_float64, double)
