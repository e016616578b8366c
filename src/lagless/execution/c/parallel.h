/* The elements of many tensors divided among threads. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { MOST_THREADS = 256, ALIGNED = 64 };

/* One thread's elements, counted through all tensors in order. */
typedef struct {
    size_t tensors, rows;
    const int64_t *sizes;   /* (tensors): elements of each row of a tensor */
    char *const *addresses; /* (tensors, rows) */
    const void *constants;
    int64_t begin, end;
} Share;

/* Set `from` and `to` to the elements of the tensor that are in the share, given where the tensor starts. */
static int64_t in_share(const Share *share, int64_t start, int64_t size, int64_t *from, int64_t *to)
{
    *from = share->begin > start ? share->begin - start : 0;
    *to = share->end - start < size ? share->end - start : size;
    return *to - *from;
}

/* Divide the elements evenly; this thread takes the last share, and those for which no thread can be started. */
static void run_shares(void *(*work)(void *), Share all, size_t threads)
{
    Share shares[MOST_THREADS];
    pthread_t started[MOST_THREADS];
    int running[MOST_THREADS];
    int64_t total = 0, begin = 0;
    for (size_t t = 0; t < all.tensors; t++) total += all.sizes[t];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    for (size_t i = 0; i < threads; i++) {
        const int64_t even = total / (int64_t)threads * (int64_t)(i + 1);
        shares[i] = all;
        shares[i].begin = begin;
        shares[i].end = begin = i + 1 < threads ? even / ALIGNED * ALIGNED : total;
        running[i] = i + 1 < threads && pthread_create(&started[i], NULL, work, &shares[i]) == 0;
        if (!running[i]) work(&shares[i]);
    }
    for (size_t i = 0; i < threads; i++)
        if (running[i]) pthread_join(started[i], NULL);
}

/* A function NAME that gives NAME##_at(n, rows, from, constants) elements from .. from + n of every tensor. */
#define RUN_ROWS(NAME, REAL, WIDTH)                                                                             \
    static void *NAME##_share(void *given)                                                                      \
    {                                                                                                           \
        const Share *share = given;                                                                             \
        int64_t start = 0, from, to; /* start: of the tensor */                                                 \
        for (size_t t = 0; t < share->tensors && start < share->end; start += share->sizes[t++])                \
            if (in_share(share, start, share->sizes[t], &from, &to) > 0)                                        \
                NAME##_at(to - from, (REAL *const *)share->addresses + WIDTH * t, from, share->constants);      \
        return NULL;                                                                                            \
    }                                                                                                           \
    void NAME(size_t tensors, const int64_t *sizes, char *const *addresses, const NAME##_constants *constants,  \
        size_t threads)                                                                                         \
    {                                                                                                           \
        run_shares(NAME##_share, (Share){tensors, WIDTH, sizes, addresses, constants, 0, 0}, threads);          \
    }
