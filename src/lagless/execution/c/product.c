/* What the streamed product does for every block, each by one call: a call from Python hands over the interpreter's lock
   and takes it back, which costs two threads more than the work on a small piece.

   Y = W X for a few short rows, on which a BLAS spends most of its time packing: the sums of ROWS rows and a chunk of
   columns stay in registers, and the chunk's X in the nearest cache. Every element is summed in the same order by the
   same operations wherever it stands, so it does not depend on the chunks. */

#define _FILE_OFFSET_BITS 64
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

/* Fill n pieces of memory, each from a file at a position. Returns how many are full: fewer than n if a file ended or
   could not be read. */
size_t read_pieces(size_t n, const int32_t *files, const int64_t *positions, const int64_t *sizes, char *const *pieces)
{
    for (size_t i = 0; i < n; i++)
        for (int64_t done = 0; done < sizes[i];) {
            const ssize_t count = pread(files[i], pieces[i] + done, (size_t)(sizes[i] - done), positions[i] + done);
            if (count <= 0) return i;
            done += count;
        }
    return n;
}

#ifdef __AVX512F__
#define BYTES 64
#define VECTORS 4
#else
#define BYTES 32
#define VECTORS 2
#endif
#define ROWS 5 /* ROWS * VECTORS sums, VECTORS pieces of X and a weight fit the registers */
#define LINE 64 /* bytes of a line of the cache */
#define AHEAD 8 /* chunks: lines of Y are fetched so far ahead, which a processor does not do for many rows by itself */
#define UNROLLED _Pragma("GCC unroll 8")

/* Rows r to r + ROWS (or one row) of a chunk of `pieces` PIECEs, each of them one or more REALs. */
#define CHUNK(NAME, REAL, PIECE)                                                                                \
    static inline __attribute__((always_inline)) void NAME(const size_t rows, const size_t pieces, size_t n,    \
        const REAL *w, const REAL *x, size_t x_stride, REAL *y, size_t y_stride)                                \
    {                                                                                                           \
        const size_t lanes = sizeof(PIECE) / sizeof(REAL);                                                      \
        PIECE sum[ROWS][VECTORS];                                                                               \
        UNROLLED for (size_t r = 0; r < rows; r++)                                                              \
            UNROLLED for (size_t b = 0; b < pieces * sizeof(PIECE); b += LINE)                                  \
                __builtin_prefetch((const char *)(y + r * y_stride) + AHEAD * pieces * sizeof(PIECE) + b, 1);   \
        UNROLLED for (size_t r = 0; r < rows; r++)                                                              \
            UNROLLED for (size_t v = 0; v < pieces; v++) sum[r][v] = (PIECE){0};                                \
        UNROLLED for (size_t k = 0; k < n; k++) {                                                               \
            PIECE piece[VECTORS];                                                                               \
            UNROLLED for (size_t v = 0; v < pieces; v++) piece[v] = *(const PIECE *)(x + k * x_stride + v * lanes); \
            UNROLLED for (size_t r = 0; r < rows; r++)                                                          \
                UNROLLED for (size_t v = 0; v < pieces; v++) sum[r][v] += w[r * n + k] * piece[v];              \
        }                                                                                                       \
        UNROLLED for (size_t r = 0; r < rows; r++)                                                              \
            UNROLLED for (size_t v = 0; v < pieces; v++) *(PIECE *)(y + r * y_stride + v * lanes) = sum[r][v];  \
    }

/* w: (g, n) without gaps; x: (n, count) and y: (g, count), their rows x_stride and y_stride elements apart.
   Returns whether the rows of y listed in `checked` are finite. */
#define PRODUCT(NAME, REAL)                                                                                     \
    typedef REAL NAME##_vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL))));                      \
    CHUNK(NAME##_chunk, REAL, NAME##_vector)                                                                    \
    CHUNK(NAME##_column, REAL, REAL)                                                                            \
    static int NAME##_finite(size_t count, const REAL *y)                                                       \
    {                                                                                                           \
        NAME##_vector zeros[4] = {{0}}; /* NaN and infinity times 0 are NaN, which stays in a sum */            \
        const size_t lanes = BYTES / sizeof(REAL);                                                              \
        REAL total = 0;                                                                                         \
        size_t c = 0;                                                                                           \
        for (; c + 4 * lanes <= count; c += 4 * lanes)                                                          \
            UNROLLED for (size_t v = 0; v < 4; v++) zeros[v] += 0 * *(const NAME##_vector *)(y + c + v * lanes); \
        for (; c < count; c++) total += 0 * y[c];                                                               \
        for (size_t i = 0; i < 4 * lanes; i++) total += zeros[i / lanes][i % lanes];                            \
        return total == 0;                                                                                      \
    }                                                                                                           \
    int NAME(size_t g, size_t n, size_t count, const REAL *w, const REAL *x, size_t x_stride, REAL *y,          \
        size_t y_stride, size_t checks, const int64_t *checked)                                                 \
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
        for (size_t i = 0; i < checks; i++)                                                                     \
            if (!NAME##_finite(count, y + (size_t)checked[i] * y_stride)) return 0;                             \
        return 1;                                                                                               \
    }

PRODUCT(product_float32, float)
PRODUCT(product_float64, double)
