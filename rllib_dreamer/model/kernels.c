/* Native twins of the elementwise chains in ops.py, for CPUs: one pass over memory, forward and
 * backward. `kernels_build.py` compiles this file on first use; `kernels.py` and `kernels_rssm.py`
 * say what each function computes and own every buffer. Arithmetic is float32 throughout; storage is
 * float32 or bfloat16, for which the second half of the file is included twice. NaN and infinities
 * go through as in PyTorch, but for a NaN that a pool compares with a number. Row strides, named ld
 * as in BLAS, let rows lie inside wider ones. */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define MAX_THREADS omp_get_max_threads()
#else
#define MAX_THREADS 1
#define THREAD 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define EPS 1e-4f
#define CHUNK 64       /* rows that a float32 sum runs over before it is added to a float64 */
#define ENOUGH 16384    /* elements from which on a second thread pays */

typedef uint16_t bf16;
typedef union {
    float f;
    int32_t i;
    uint32_t u;
} bits;

INLINE float load_f32(float x) { return x; }
INLINE float store_f32(float x) { return x; }
INLINE float load_bf16(bf16 x) { return ((bits){.u = (uint32_t)x << 16}).f; }
INLINE bf16 store_bf16(float x) { /* to nearest, ties to even */
    uint32_t u = ((bits){.f = x}).u;
    return x != x ? 0x7fc0 : (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* exp to 2 units in the last place: 2^n * exp(r), |r| <= ln(2) / 2, by a polynomial. Arguments
 * beyond +-60 count as 60: compilers compute both sides of such a choice, and a side that falls
 * below the normal numbers costs a hundred cycles. */
INLINE float exp_(float x) {
    x = x < -60.0f ? -60.0f : x;
    x = x > 60.0f ? 60.0f : x;
    bits shifted = {.f = x * 1.44269504f + 12582912.0f}; /* 1.5 * 2^23 rounds to an integer */
    float n = shifted.f - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    bits y = {.f = p * r * r + r + 1.0f};
    y.i += (int32_t)((uint32_t)(shifted.i - 0x4b400000) << 23);
    return y.f;
}

INLINE float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }

INLINE float tanh_(float x) { return 2.0f * sigmoid_(2.0f * x) - 1.0f; }

/* Sums are kept in LANES parts, which compilers turn into one vector register, and folded at the
 * end: for (...) lanes[c % LANES] += ..., written as a loop over blocks and a rest. */
#define LANES 16
#define FOR_LANES(c, C, BODY)                                                    \
    {                                                                            \
        int64_t block_ = 0;                                                      \
        for (; block_ + LANES <= (C); block_ += LANES)                           \
            _Pragma("omp simd") for (int lane = 0; lane < LANES; lane++) {       \
                int64_t c = block_ + lane;                                       \
                BODY                                                             \
            }                                                                    \
        _Pragma("omp simd") for (int lane = 0; lane < (int)((C) - block_); lane++) { \
            int64_t c = block_ + lane;                                           \
            BODY                                                                 \
        }                                                                        \
    }

INLINE float fold(float *lanes) {
    for (int i = 0; i < 8; i++) lanes[i] += lanes[i + 8];
    for (int i = 0; i < 4; i++) lanes[i] += lanes[i + 4];
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

INLINE int64_t stop_of(int64_t start, int64_t rows) {
    return start + CHUNK < rows ? start + CHUNK : rows;
}

/* Where row r of the phases (n, h, w, 2, 2) lies in the image (n, 2h, 2w); w = 0: no phases. */
INLINE int64_t placed(int64_t r, int64_t w) {
    if (!w) return r;
    uint32_t small = (uint32_t)(r >> 2), line = small / (uint32_t)w, column = small % (uint32_t)w;
    return ((int64_t)line * 2 + ((r >> 1) & 1)) * 2 * w + 2 * column + (r & 1);
}

/* Calls CALL with the row width as a constant where it is one of the usual small ones. */
#define WITH_WIDTH(C, CALL)                                                          \
    switch (C) {                                                                     \
        case 8: CALL(8); break;                                                      \
        case 12: CALL(12); break;                                                    \
        case 16: CALL(16); break;                                                    \
        case 32: CALL(32); break;                                                    \
        case 48: CALL(48); break;                                                    \
        case 64: CALL(64); break;                                                    \
        default: CALL(C);                                                            \
    }

/* SiLU(RMSNorm) is computed tile by tile, from float32 to float32. A row wider than a vector register
 * is a tile; of narrower ones it takes many, and what needs no row runs over all of them at once. */
INLINE int64_t tile_rows(int64_t C) { return C > LANES ? 1 : CHUNK; }

INLINE void rsqrt_mean(const float *x, float *r, int64_t n, const int64_t C) {
    for (int64_t i = 0; i < n; i++) {
        float lanes[LANES] = {0};
        FOR_LANES(c, C, { lanes[lane] += x[i * C + c] * x[i * C + c]; })
        r[i] = fold(lanes);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) r[i] = 1.0f / sqrtf(r[i] / (float)C + EPS);
}

/* y may be x. */
INLINE void tile_forward(const float *x, const float *scale, float *y, int64_t n, const int64_t C) {
    float r[n];
    rsqrt_mean(x, r, n, C);
    if (C > LANES) {
        FOR_LANES(c, C, {
            float z = x[c] * r[0] * scale[c];
            y[c] = z * sigmoid_(z);
        })
        return;
    }
    for (int64_t i = 0; i < n; i++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) y[i * C + c] = x[i * C + c] * r[i] * scale[c];
#pragma omp simd
    for (int64_t i = 0; i < n * C; i++) y[i] *= sigmoid_(y[i]);
}

INLINE float silu_gradient(float z) {
    float s = sigmoid_(z);
    return s * (1.0f + z * (1.0f - s));
}

/* Gradient gx of x from gy, that of y; gx may be gy. Adds the gradient of the scale to gscale. */
INLINE void tile_backward(const float *x, const float *scale, const float *gy, float *gx,
                          float *gscale, int64_t n, const int64_t C) {
    const int narrow = C <= LANES;
    float r[n], gz[n * C];
    rsqrt_mean(x, r, n, C);
    if (narrow) {
        for (int64_t i = 0; i < n; i++)
#pragma omp simd
            for (int64_t c = 0; c < C; c++) gz[i * C + c] = x[i * C + c] * r[i] * scale[c];
#pragma omp simd
        for (int64_t i = 0; i < n * C; i++) gz[i] = gy[i] * silu_gradient(gz[i]);
    }
    for (int64_t i = 0; i < n; i++, x += C, gy += C, gx += C) {
        float lanes[LANES] = {0};
        FOR_LANES(c, C, {
            float unit = x[c] * r[i];
            float g = narrow ? gz[i * C + c] : gy[c] * silu_gradient(unit * scale[c]);
            gscale[c] += g * unit;
            gx[c] = g * scale[c];
            lanes[lane] += g * scale[c] * unit;
        })
        float dot = fold(lanes) / (float)C * r[i];
#pragma omp simd
        for (int64_t c = 0; c < C; c++) gx[c] = r[i] * (gx[c] - x[c] * dot);
    }
}

#define REAL float
#define NAME(f) f##_f32
#define LOAD load_f32
#define STORE store_f32
#include __FILE__
#undef REAL
#undef NAME
#undef LOAD
#undef STORE
#define REAL bf16
#define NAME(f) f##_bf16
#define LOAD load_bf16
#define STORE store_bf16
#include __FILE__

/* Threads that a parallel region of the calling thread may have. */
EXPORT int64_t max_threads(void) { return MAX_THREADS; }

EXPORT void normalize_frames(const uint8_t *frames, float *y, int64_t n) {
#pragma omp parallel for simd schedule(static) if (n > ENOUGH)
    for (int64_t i = 0; i < n; i++) y[i] = (float)frames[i] / 255.0f - 0.5f;
}

/* LaProp, see optim.py. factors: of the clipping, of the weight decay, beta1, beta2, 1 - beta2^t,
 * eps, learning rate / (1 - beta1^t). */
EXPORT void laprop(float *param, const float *grad, float *momentum, float *square,
                   int64_t n, const float *factors) {
    const float shrink = factors[0], keep = factors[1], beta1 = factors[2], beta2 = factors[3],
                debias = factors[4], eps = factors[5], lr = factors[6];
#pragma omp parallel for simd schedule(static) if (n > ENOUGH)
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * shrink;
        float v = square[i] * beta2 + g * g * (1.0f - beta2);
        float m = momentum[i] + (1.0f - beta1) * (g / (sqrtf(v / debias) + eps) - momentum[i]);
        square[i] = v;
        momentum[i] = m;
        param[i] = param[i] * keep - lr * m;
    }
}

/* Products of a few rows with blocks of weights, where a library's own overhead would count: tiles of
 * TILE_ROWS rows and two vectors of columns stay in registers on the way down the weights. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define TILE_COLUMNS (2 * LANES)
#ifdef __AVX512F__
#define TILE_ROWS 8
#else
#define TILE_ROWS 2
#endif

INLINE void product_tile(float *out, int64_t ldo, const float *x, int64_t ldx, const float *w,
                         int64_t ldw, int64_t beta, int64_t depth, const int rows) {
    vector left[TILE_ROWS] = {0}, right[TILE_ROWS] = {0};
    for (int r = 0; r < rows && beta; r++) {
        left[r] = *(const vector *)(out + r * ldo);
        right[r] = *(const vector *)(out + r * ldo + LANES);
    }
    for (int64_t k = 0; k < depth; k++, w += ldw) {
        vector w_left = *(const vector *)w, w_right = *(const vector *)(w + LANES);
        for (int r = 0; r < rows; r++) {
            left[r] += x[r * ldx + k] * w_left;
            right[r] += x[r * ldx + k] * w_right;
        }
    }
    for (int r = 0; r < rows; r++) {
        *(vector *)(out + r * ldo) = left[r];
        *(vector *)(out + r * ldo + LANES) = right[r];
    }
}

/* out (n, G * o) = beta * out + x (n, G * i) w (G, i, o), for beta 0 or 1; the blocks of w are ldw
 * apart. */
EXPORT void block_products(float *out, int64_t ldo, const float *x, int64_t ldx, const float *w,
                           int64_t ldw, int64_t beta, int64_t n, int64_t G, int64_t I, int64_t O) {
    const int64_t tiles = (O + TILE_COLUMNS - 1) / TILE_COLUMNS;
#pragma omp parallel for collapse(2) schedule(static) if (n * G * I * O > 16 * ENOUGH)
    for (int64_t g = 0; g < G; g++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = tile * TILE_COLUMNS, columns = O - first;
            const float *from = x + g * I, *weights = w + g * ldw + first;
            float *to = out + g * O + first;
            int64_t r = 0;
            if (columns >= TILE_COLUMNS) {
                for (; r + TILE_ROWS <= n; r += TILE_ROWS)
                    product_tile(to + r * ldo, ldo, from + r * ldx, ldx, weights, O, beta, I,
                                 TILE_ROWS);
                for (; r < n; r++)
                    product_tile(to + r * ldo, ldo, from + r * ldx, ldx, weights, O, beta, I, 1);
            }
            for (; r < n; r++)
                for (int64_t c = 0; c < columns; c++) {
                    float sum = beta ? to[r * ldo + c] : 0.0f;
                    for (int64_t k = 0; k < I; k++) sum += from[r * ldx + k] * weights[k * O + c];
                    to[r * ldo + c] = sum;
                }
        }
}

/* Probabilities (1 - unimix) * softmax(x) + unimix / K; also the softmax itself. */
INLINE void mixed_softmax(const float *x, float *soft, float *probs, float unimix, int64_t K) {
    float most = x[0], sum = 0.0f;
    for (int64_t k = 1; k < K; k++) most = x[k] > most ? x[k] : most;
#pragma omp simd
    for (int64_t k = 0; k < K; k++) soft[k] = exp_(x[k] - most);
    for (int64_t k = 0; k < K; k++) sum += soft[k];
    for (int64_t k = 0; k < K; k++) {
        soft[k] /= sum;
        probs[k] = (1.0f - unimix) * soft[k] + unimix / (float)K;
    }
}

/* Draws classes from logits (rows, S, K) by inverting the cumulative distribution, or takes the
 * most probable ones (noise = 0). stoch: one-hot rows with stride lds. unimix: one number. */
EXPORT void sample_forward(const float *logits, const float *noise, float *stoch, int64_t lds,
                           int64_t *index, int64_t rows, int64_t S, int64_t K,
                           const float *unimix) {
#pragma omp parallel for schedule(static) if (rows * S * K > ENOUGH)
    for (int64_t r = 0; r < rows; r++) {
        float soft[K], probs[K];
        for (int64_t s = 0; s < S; s++) {
            mixed_softmax(logits + (r * S + s) * K, soft, probs, *unimix, K);
            float *hot = stoch + r * lds + s * K;
            int64_t chosen = 0;
            if (noise) {
                for (int64_t k = 1; k < K; k++) probs[k] += probs[k - 1];
                float threshold = noise[r * S + s] * probs[K - 1];
                for (int64_t k = 0; k < K - 1; k++) chosen += probs[k] <= threshold;
            } else
                for (int64_t k = 1; k < K; k++) chosen = probs[k] > probs[chosen] ? k : chosen;
            for (int64_t k = 0; k < K; k++) hot[k] = k == chosen ? 1.0f : 0.0f;
            index[r * S + s] = chosen;
        }
    }
}

/* Straight-through: adds the gradient that reaches the logits through the probabilities. */
EXPORT void sample_backward(const float *logits, const float *gstoch, float *glogits, int64_t rows,
                            int64_t S, int64_t K, const float *unimix) {
#pragma omp parallel for schedule(static) if (rows * S * K > ENOUGH)
    for (int64_t r = 0; r < rows * S; r++) {
        float soft[K], probs[K], mean = 0.0f;
        const float *g = gstoch + r * K;
        mixed_softmax(logits + r * K, soft, probs, *unimix, K);
        for (int64_t k = 0; k < K; k++) mean += soft[k] * g[k];
        for (int64_t k = 0; k < K; k++)
            glogits[r * K + k] += (1.0f - *unimix) * soft[k] * (g[k] - mean);
    }
}

/* Of two-hot logits (rows, K): log of the normaliser and expected bin. The bins are
 * symmetric about zero, so that symmetric probabilities give exactly 0. */
EXPORT void two_hot_forward(const float *logits, const float *bins, float *log_sum, float *mean,
                            int64_t rows, int64_t K) {
    const int64_t middle = (K - 1) / 2;
#pragma omp parallel for schedule(static) if (rows * K > ENOUGH)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * K;
        float most = x[0], e[K], lanes[LANES] = {0}, sums[LANES] = {0};
        for (int64_t k = 1; k < K; k++) most = x[k] > most ? x[k] : most;
        FOR_LANES(k, K, {
            e[k] = exp_(x[k] - most);
            lanes[lane] += e[k];
        })
        FOR_LANES(k, middle, { sums[lane] += (e[k] - e[K - 1 - k]) * bins[k]; })
        float total = fold(lanes);
        log_sum[r] = most + logf(total);
        mean[r] = fold(sums) / total;
    }
}

/* Gradient of the cross-entropy to weights (1 - w, w) on the bins below and above. */
EXPORT void two_hot_backward(const float *logits, const float *log_sum, const int64_t *below,
                             const int64_t *above, const float *weight, const float *grad,
                             float *glogits, int64_t rows, int64_t K) {
#pragma omp parallel for schedule(static) if (rows * K > ENOUGH)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * K;
        float *g = glogits + r * K, shift = log_sum[r], scale = grad[r];
        FOR_LANES(k, K, { g[k] = scale * exp_(x[k] - shift); })
        g[below[r]] -= scale * (1.0f - weight[r]);
        g[above[r]] -= scale * weight[r];
    }
}

#else /* for each storage type */

/* n numbers as float32: where they lie, if they are, else in the buffer. */
INLINE const float *NAME(widen)(const REAL *x, float *restrict buffer, int64_t n) {
    if (sizeof(REAL) == sizeof(float)) return (const float *)x;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) buffer[i] = LOAD(x[i]);
    return buffer;
}

/* Where float32 results for x are computed, which `put` then brings there. */
INLINE float *NAME(result)(REAL *x, float *buffer) {
    return sizeof(REAL) == sizeof(float) ? (float *)x : buffer;
}

INLINE void NAME(put)(const float *restrict f, REAL *restrict x, int64_t n) {
    if ((const void *)f == (const void *)x) return;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = STORE(f[i]);
}

INLINE void NAME(forward)(const REAL *x, const float *scale, REAL *y, int64_t ldy, int64_t start,
                          int64_t stop, int64_t w, const int64_t C) {
    const int64_t most = tile_rows(C);
    float buffer[most * C];
    REAL tile[most * C];
    for (int64_t at = start; at < stop; at += most) {
        int64_t n = at + most < stop ? most : stop - at;
        REAL *to = most == 1 ? y + placed(at, w) * ldy : tile;
        float *f = NAME(result)(to, buffer);
        tile_forward(NAME(widen)(x + at * C, buffer, n * C), scale, f, n, C);
        NAME(put)(f, to, n * C);
        for (int64_t i = 0; i < n && most > 1; i++)
            memcpy(y + placed(at + i, w) * ldy, tile + i * C, C * sizeof(REAL));
    }
}

EXPORT void NAME(norm_silu_forward)(const REAL *x, const float *scale, REAL *y, int64_t ldy,
                                    int64_t rows, int64_t C, int64_t w) {
#define CALL(width) NAME(forward)(x, scale, y, ldy, start, stop_of(start, rows), w, width)
#pragma omp parallel for schedule(static) if (rows * C > ENOUGH)
    for (int64_t start = 0; start < rows; start += CHUNK) WITH_WIDTH(C, CALL)
#undef CALL
}

/* partial: (threads, C) zeros, each thread adds its share of the gradient of the scale. */
INLINE void NAME(backward)(const REAL *x, const float *scale, const REAL *gy, int64_t ldg, REAL *gx,
                           double *partial, int64_t start, int64_t stop, int64_t w,
                           const int64_t C) {
    const int64_t most = tile_rows(C);
    float f[most * C], g[most * C], gscale[C];
    REAL tile[most * C];
    for (int64_t c = 0; c < C; c++) gscale[c] = 0.0f;
    for (int64_t at = start; at < stop; at += most) {
        int64_t n = at + most < stop ? most : stop - at;
        for (int64_t i = 0; i < n && most > 1; i++)
            memcpy(tile + i * C, gy + placed(at + i, w) * ldg, C * sizeof(REAL));
        const REAL *from = most == 1 ? gy + placed(at, w) * ldg : tile;
        float *to = NAME(result)(gx + at * C, g);
        tile_backward(NAME(widen)(x + at * C, f, n * C), scale, NAME(widen)(from, g, n * C), to,
                      gscale, n, C);
        NAME(put)(to, gx + at * C, n * C);
    }
    for (int64_t c = 0; c < C; c++) partial[THREAD * C + c] += gscale[c];
}

EXPORT void NAME(norm_silu_backward)(const REAL *x, const float *scale, const REAL *gy, int64_t ldg,
                                     REAL *gx, double *partial, int64_t rows, int64_t C,
                                     int64_t w) {
#define CALL(width) \
    NAME(backward)(x, scale, gy, ldg, gx, partial, start, stop_of(start, rows), w, width)
#pragma omp parallel for schedule(static) if (rows * C > ENOUGH)
    for (int64_t start = 0; start < rows; start += CHUNK) WITH_WIDTH(C, CALL)
#undef CALL
}

/* One pooled line of w columns from x (2, w, 2, C). Keeps the maximum and which of the four it was,
 * in reading order. */
INLINE void NAME(pool_forward)(const REAL *x, const float *scale, REAL *y, REAL *pooled,
                               uint8_t *which, int64_t w, const int64_t C) {
    const int64_t most = tile_rows(C);
    float above[2 * most * C], below[2 * most * C], buffer[most * C];
    int32_t place[most * C];
    for (int64_t at = 0; at < w; at += most) {
        int64_t n = at + most < w ? most : w - at;
        const float *top = NAME(widen)(x + 2 * at * C, above, 2 * n * C);
        const float *bottom = NAME(widen)(x + 2 * (w + at) * C, below, 2 * n * C);
        float *f = NAME(result)(pooled + at * C, buffer);
        for (int64_t j = 0; j < n; j++)
#pragma omp simd
            for (int64_t c = 0; c < C; c++) {
                int64_t left = 2 * j * C + c, right = left + C;
                float a = top[left], b = top[right], d = bottom[left], e = bottom[right];
                float upper = a >= b ? a : b, lower = d >= e ? d : e;
                int32_t upper_at = a >= b ? 0 : 1, lower_at = d >= e ? 2 : 3;
                f[j * C + c] = upper >= lower ? upper : lower;
                place[j * C + c] = upper >= lower ? upper_at : lower_at;
            }
#pragma omp simd
        for (int64_t i = 0; i < n * C; i++) which[at * C + i] = (uint8_t)place[i];
        NAME(put)(f, pooled + at * C, n * C);
        float *to = NAME(result)(y + at * C, buffer);
        tile_forward(f, scale, to, n, C);
        NAME(put)(to, y + at * C, n * C);
    }
}

EXPORT void NAME(pool_norm_silu_forward)(const REAL *x, const float *scale, REAL *y, REAL *pooled,
                                         uint8_t *which, int64_t rows, int64_t w, int64_t C) {
#define CALL(width) \
    NAME(pool_forward)(x + 4 * at, scale, y + at, pooled + at, which + at, w, width)
#pragma omp parallel for schedule(static) if (rows * w * C > ENOUGH)
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = i * w * C;
        WITH_WIDTH(C, CALL)
    }
#undef CALL
}

INLINE void NAME(pool_backward)(const REAL *pooled, const uint8_t *which, const float *scale,
                                const REAL *gy, REAL *gx, double *partial, int64_t w,
                                const int64_t C) {
    const int64_t most = tile_rows(C);
    float f[most * C], g[most * C], above[2 * most * C], below[2 * most * C], gscale[C];
    int32_t place[most * C];
    for (int64_t c = 0; c < C; c++) gscale[c] = 0.0f;
    for (int64_t at = 0; at < w; at += most) {
        int64_t n = at + most < w ? most : w - at;
        REAL *upper = gx + 2 * at * C, *lower = gx + 2 * (w + at) * C;
        float *top = NAME(result)(upper, above), *bottom = NAME(result)(lower, below);
        tile_backward(NAME(widen)(pooled + at * C, f, n * C), scale,
                      NAME(widen)(gy + at * C, g, n * C), g, gscale, n, C);
#pragma omp simd
        for (int64_t i = 0; i < n * C; i++) place[i] = which[at * C + i];
        for (int64_t j = 0; j < n; j++)
#pragma omp simd
            for (int64_t c = 0; c < C; c++) {
                int64_t left = 2 * j * C + c, right = left + C;
                int32_t k = place[j * C + c];
                top[left] = k == 0 ? g[j * C + c] : 0.0f;
                top[right] = k == 1 ? g[j * C + c] : 0.0f;
                bottom[left] = k == 2 ? g[j * C + c] : 0.0f;
                bottom[right] = k == 3 ? g[j * C + c] : 0.0f;
            }
        NAME(put)(top, upper, 2 * n * C);
        NAME(put)(bottom, lower, 2 * n * C);
    }
    for (int64_t c = 0; c < C; c++) partial[THREAD * C + c] += gscale[c];
}

EXPORT void NAME(pool_norm_silu_backward)(const REAL *pooled, const uint8_t *which,
                                          const float *scale, const REAL *gy, REAL *gx,
                                          double *partial, int64_t rows, int64_t w, int64_t C) {
#define CALL(width) \
    NAME(pool_backward)(pooled + at, which + at, scale, gy + at, gx + 4 * at, partial, w, width)
#pragma omp parallel for schedule(static) if (rows * w * C > ENOUGH)
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = i * w * C;
        WITH_WIDTH(C, CALL)
    }
#undef CALL
}

/* One image line from phases (w, 2, 2, C) of its row parity, two columns at a time. */
INLINE void NAME(gather_line)(const REAL *phases, float *line, int64_t w, int64_t pair) {
    for (int64_t j = 0; j < w; j++)
        for (int64_t c = 0; c < pair; c++) line[j * pair + c] = LOAD(phases[2 * j * pair + c]);
}

EXPORT void NAME(image_loss_forward)(const REAL *phases, const uint8_t *target, float *loss,
                                     int64_t n, int64_t h, int64_t w, int64_t C) {
    const int64_t pair = 2 * C, width = w * pair;
#pragma omp parallel for schedule(static) if (n * h * width > ENOUGH)
    for (int64_t k = 0; k < n; k++) {
        float line[width], sum = 0.0f;
        for (int64_t y = 0; y < 2 * h; y++) {
            const uint8_t *truth = target + (k * 2 * h + y) * width;
            NAME(gather_line)(phases + (k * h + y / 2) * 2 * width + (y % 2) * pair, line, w, pair);
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++) {
                float error = sigmoid_(line[i]) - (float)truth[i] / 255.0f;
                sum += error * error;
            }
        }
        loss[k] = sum;
    }
}

EXPORT void NAME(image_loss_backward)(const REAL *phases, const uint8_t *target, const float *grad,
                                      REAL *gphases, int64_t n, int64_t h, int64_t w, int64_t C) {
    const int64_t pair = 2 * C, width = w * pair;
#pragma omp parallel for schedule(static) if (n * h * width > ENOUGH)
    for (int64_t k = 0; k < n; k++) {
        float line[width];
        for (int64_t y = 0; y < 2 * h; y++) {
            const uint8_t *truth = target + (k * 2 * h + y) * width;
            int64_t at = (k * h + y / 2) * 2 * width + (y % 2) * pair;
            NAME(gather_line)(phases + at, line, w, pair);
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float s = sigmoid_(line[i]), error = s - (float)truth[i] / 255.0f;
                line[i] = 2.0f * grad[k] * error * s * (1.0f - s);
            }
            for (int64_t j = 0; j < w; j++)
                for (int64_t c = 0; c < pair; c++)
                    gphases[at + 2 * j * pair + c] = STORE(line[j * pair + c]);
        }
    }
}

/* Gates (rows, G, 3, d) before their bias, d = D / G: reset, candidate, update. */
EXPORT void NAME(gru_forward)(const REAL *gates, const float *bias, const float *deter,
                              int64_t ldd, float *out, int64_t ldo, int64_t rows, int64_t G,
                              int64_t d) {
#pragma omp parallel for schedule(static) if (rows * G * d > ENOUGH)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < G; g++) {
            const REAL *a = gates + (r * G + g) * 3 * d;
            const float *b = bias + g * 3 * d, *before = deter + r * ldd + g * d;
            float *after = out + r * ldo + g * d;
#pragma omp simd
            for (int64_t i = 0; i < d; i++) {
                float reset = sigmoid_(LOAD(a[i]) + b[i]);
                float cand = tanh_(reset * (LOAD(a[d + i]) + b[d + i]));
                float update = sigmoid_(LOAD(a[2 * d + i]) + b[2 * d + i] - 1.0f);
                after[i] = before[i] + update * (cand - before[i]);
            }
        }
}

EXPORT void NAME(gru_backward)(const REAL *gates, const float *bias, const float *deter,
                               const float *gout, REAL *ggates, float *gdeter, int64_t rows,
                               int64_t G, int64_t d) {
#pragma omp parallel for schedule(static) if (rows * G * d > ENOUGH)
    for (int64_t k = 0; k < rows * G; k++) {
        const REAL *a = gates + k * 3 * d;
        REAL *ga = ggates + k * 3 * d;
        const float *b = bias + k % G * 3 * d, *before = deter + k * d, *go = gout + k * d;
        float *gbefore = gdeter + k * d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float raw = LOAD(a[d + i]) + b[d + i];
            float reset = sigmoid_(LOAD(a[i]) + b[i]);
            float cand = tanh_(reset * raw);
            float update = sigmoid_(LOAD(a[2 * d + i]) + b[2 * d + i] - 1.0f);
            float gcand = go[i] * update * (1.0f - cand * cand);
            ga[i] = STORE(gcand * raw * reset * (1.0f - reset));
            ga[d + i] = STORE(gcand * reset);
            ga[2 * d + i] = STORE(go[i] * (cand - before[i]) * update * (1.0f - update));
            gbefore[i] = go[i] * (1.0f - update);
        }
    }
}

#endif
