/* Causal self-attention of short sequences and small heads, float32, with rotary positions, forward and backward.

   Lanes of a vector are positions: 16 queries at a time against one key, or 16 keys at a time against one query, so that
   nothing is summed across lanes. Probabilities are computed again in the backward pass, from the logarithms of their
   sums. Arrays are (batch, length, heads, D), contiguous; `cos` and `sin` are (length, D / 2). */

#include <cstdint>
#include <cmath>
#include <cstring>

#ifndef D
#error "compile with -DD=<head size>"
#endif
#define L 16
#define MAX 1024

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t whole __attribute__((vector_size(64)));

static inline lanes all(float x) { return x - (lanes){}; }

/* exp(x) for x <= 0, relative error about 1e-7; 0 below -60, which is nothing beside a sum of at least 1: products with
   gradients would be denormal, and a hundred times slower */
static inline lanes exponential(lanes x) {
    whole nothing = x < all(-60.0f);
    x = nothing ? all(-60.0f) : x;
    lanes n = x * all(1.44269504f) - all(0.5f);
    whole k = __builtin_convertvector(n, whole); /* towards zero, so to the nearest of a negative number */
    n = __builtin_convertvector(k, lanes);
    lanes r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    lanes y = all(1.9875691e-4f);
    y = y * r + all(1.3981999e-3f);
    y = y * r + all(8.3334519e-3f);
    y = y * r + all(4.1665796e-2f);
    y = y * r + all(1.6666665e-1f);
    y = y * r + all(5.0000001e-1f);
    y = y * r * r + r + all(1.0f);
    whole bits = (k + 127) << 23;
    lanes power;
    memcpy(&power, &bits, sizeof power);
    return nothing ? all(0.0f) : y * power;
}

/* one head's vectors, rotated, times `scale`; and their transpose, lanes of 16 positions */
static void rotate(const float *x, int64_t stride, int64_t length, const float *cos, const float *sin, float scale,
                   float (*rows)[D], lanes (*columns)[D]) {
    for (int64_t t = 0; t < length; t++)
        for (int d = 0; d < D / 2; d++) {
            float c = cos[t * (D / 2) + d], s = sin[t * (D / 2) + d];
            float a = x[t * stride + d], b = x[t * stride + d + D / 2];
            rows[t][d] = (a * c - b * s) * scale;
            rows[t][d + D / 2] = (b * c + a * s) * scale;
        }
    for (int64_t t = 0; t < length; t++)
        for (int d = 0; d < D; d++) columns[t / L][d][t % L] = rows[t][d];
}

static void rotate_back(const float (*rows)[D], int64_t length, const float *cos, const float *sin, float *x,
                        int64_t stride) {
    for (int64_t t = 0; t < length; t++)
        for (int d = 0; d < D / 2; d++) {
            float c = cos[t * (D / 2) + d], s = sin[t * (D / 2) + d];
            float a = rows[t][d], b = rows[t][d + D / 2];
            x[t * stride + d] += a * c + b * s;
            x[t * stride + d + D / 2] += b * c - a * s;
        }
}

static void copy_head(const float *x, int64_t stride, int64_t length, float (*rows)[D], lanes (*columns)[D]) {
    for (int64_t t = 0; t < length; t++)
        for (int d = 0; d < D; d++) columns[t / L][d][t % L] = rows[t][d] = x[t * stride + d];
}

static inline lanes dot(const float *one, const lanes *many) {
    lanes sum = one[0] * many[0];
    for (int d = 1; d < D; d++) sum += one[d] * many[d];
    return sum;
}

static const whole COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

extern "C" int attention_forward(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, float scale, const float *q,
                      const float *k, const float *v, const float *cos, const float *sin, float *out, float *log_sums) {
    static thread_local float Q[MAX][D], K[MAX][D], V[MAX][D];
    static thread_local lanes Qt[MAX / L][D], Kt[MAX / L][D], Vt[MAX / L][D], S[MAX];
    if (length > MAX || length % L) return 1;
    int64_t of_q = heads * D, of_kv = kv_heads * D, group = heads / kv_heads;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = b * length * of_q + h * D, at_kv = b * length * of_kv + h / group * D;
            rotate(q + at, of_q, length, cos, sin, scale, Q, Qt);
            if (h % group == 0) {
                rotate(k + at_kv, of_kv, length, cos, sin, 1.0f, K, Kt);
                copy_head(v + at_kv, of_kv, length, V, Vt);
            }
            for (int64_t i = 0; i < length; i += L) {
                lanes top = all(-1e30f), sum = all(0.0f), found[D];
                for (int64_t j = 0; j < i + L; j++) {
                    lanes s = dot(K[j], Qt[i / L]);
                    if (j > i) s = COUNT < (int32_t)(j - i) ? all(-1e30f) : s;
                    top = s > top ? s : top;
                    S[j] = s;
                }
                for (int d = 0; d < D; d++) found[d] = all(0.0f);
                for (int64_t j = 0; j < i + L; j++) {
                    lanes p = exponential(S[j] - top);
                    sum += p;
                    for (int d = 0; d < D; d++) found[d] += p * V[j][d];
                }
                for (int l = 0; l < L; l++) {
                    for (int d = 0; d < D; d++) out[at + (i + l) * of_q + d] = found[d][l] / sum[l];
                    log_sums[(b * heads + h) * length + i + l] = top[l] + std::log(sum[l]);
                }
            }
        }
    return 0;
}

/* dq, dk and dv begin as zeros */
extern "C" int attention_backward(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, float scale, const float *q,
                       const float *k, const float *v, const float *cos, const float *sin, const float *out,
                       const float *log_sums, const float *dout, float *dq, float *dk, float *dv) {
    static thread_local float Q[MAX][D], K[MAX][D], V[MAX][D], O[MAX][D], G[MAX][D], inner[MAX];
    static thread_local lanes Qt[MAX / L][D], Kt[MAX / L][D], Vt[MAX / L][D], Ot[MAX / L][D], Gt[MAX / L][D];
    if (length > MAX || length % L) return 1;
    int64_t of_q = heads * D, of_kv = kv_heads * D, group = heads / kv_heads;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = b * length * of_q + h * D, at_kv = b * length * of_kv + h / group * D;
            const float *logs = log_sums + (b * heads + h) * length;
            rotate(q + at, of_q, length, cos, sin, scale, Q, Qt);
            copy_head(out + at, of_q, length, O, Ot);
            copy_head(dout + at, of_q, length, G, Gt);
            if (h % group == 0) {
                rotate(k + at_kv, of_kv, length, cos, sin, 1.0f, K, Kt);
                copy_head(v + at_kv, of_kv, length, V, Vt);
            }
            for (int64_t i = 0; i < length; i++) {
                inner[i] = 0.0f;
                for (int d = 0; d < D; d++) inner[i] += O[i][d] * G[i][d];
            }
            /* O now takes the gradients of the rotated queries, then of the rotated keys */
            for (int64_t i = 0; i < length; i += L) {
                lanes log, mean, found[D];
                memcpy(&log, logs + i, sizeof log);
                memcpy(&mean, inner + i, sizeof mean);
                for (int d = 0; d < D; d++) found[d] = all(0.0f);
                for (int64_t j = 0; j < i + L; j++) {
                    lanes x = dot(K[j], Qt[i / L]) - log;
                    if (j > i) x = COUNT < (int32_t)(j - i) ? all(-1e30f) : x;
                    lanes ds = exponential(x) * (dot(V[j], Gt[i / L]) - mean);
                    for (int d = 0; d < D; d++) found[d] += ds * K[j][d];
                }
                for (int l = 0; l < L; l++)
                    for (int d = 0; d < D; d++) O[i + l][d] = found[d][l] * scale;
            }
            rotate_back(O, length, cos, sin, dq + at, of_q);
            for (int64_t j = 0; j < length; j += L) {
                lanes of_k[D], of_v[D];
                for (int d = 0; d < D; d++) of_k[d] = of_v[d] = all(0.0f);
                for (int64_t i = j; i < length; i++) {
                    lanes x = dot(Q[i], Kt[j / L]) - logs[i];
                    if (i < j + L) x = COUNT > (int32_t)(i - j) ? all(-1e30f) : x;
                    lanes p = exponential(x), ds = p * (dot(G[i], Vt[j / L]) - inner[i]);
                    for (int d = 0; d < D; d++) of_v[d] += p * G[i][d];
                    for (int d = 0; d < D; d++) of_k[d] += ds * Q[i][d];
                }
                for (int l = 0; l < L; l++)
                    for (int d = 0; d < D; d++) {
                        O[j + l][d] = of_k[d][l];
                        dv[at_kv + (j + l) * of_kv + d] += of_v[d][l];
                    }
            }
            rotate_back(O, length, cos, sin, dk + at_kv, of_kv);
        }
    return 0;
}
