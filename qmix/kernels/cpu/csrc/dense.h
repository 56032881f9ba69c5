// What stays in bfloat16, for one or two tokens: products, whose matrix is read once, row after row, at the
// memory's pace, and norms, in one pass where torch takes seven.

#pragma once

#include "matrix.h"

extern "C" {

struct DenseMatmul {       // y [tokens, rows] = x [tokens, inputs] W^T, y and x float32, contiguous
    const uint16_t* weight; // [rows, inputs]
    const float* x;
    float* y;
    int64_t rows, inputs, tokens;
};

}  // extern "C"

namespace {

inline __attribute__((always_inline)) float widened(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline __attribute__((always_inline)) uint16_t rounded_to_even(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    const uint32_t even = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    return uint16_t(value != value ? 0x7fc0 : even);
}

// w * (x * (1 / sqrt(mean(x^2) + eps))), rounded before and after w is multiplied.
inline __attribute__((always_inline)) void norm_values(const uint16_t* x, const uint16_t* w, int64_t width, float eps,
                                                       uint16_t* y) {
    float sums[16] = {}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += widened(x[i + lane]) * widened(x[i + lane]);
    for (; i < width; i++) sum += widened(x[i]) * widened(x[i]);
    for (float each : sums) sum += each;
    const float by = 1 / __builtin_sqrtf(sum / float(width) + eps);
    for (int64_t k = 0; k < width; k++)
        y[k] = rounded_to_even(widened(w[k]) * widened(rounded_to_even(widened(x[k]) * by)));
}

// Inputs [from, inputs) of a row, for all tokens, added to y.
inline void dense_rest(const DenseMatmul& d, int64_t row, int64_t from) {
    for (int64_t t = 0; t < d.tokens; t++)
        for (int64_t k = from; k < d.inputs; k++)
            d.y[t * d.rows + row] += widened(d.weight[row * d.inputs + k]) * d.x[t * d.inputs + k];
}

void dense_rows_portable(const DenseMatmul& d, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        for (int64_t t = 0; t < d.tokens; t++) d.y[t * d.rows + row] = 0;
        dense_rest(d, row, 0);
    }
}

#if defined(__x86_64__)

template <int M>
QMIX_AVX2 void dense_rows_avx2(const DenseMatmul& d, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const uint16_t* w = d.weight + row * d.inputs;
        __m256 sums[M][2];
        for (int t = 0; t < M; t++) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= d.inputs; k += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(w + k) + 2048, _MM_HINT_T1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k + 8 * i));
                const __m256 values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
                for (int t = 0; t < M; t++) {
                    const __m256 x = _mm256_loadu_ps(d.x + t * d.inputs + k + 8 * i);
                    sums[t][i % 2] = _mm256_fmadd_ps(values, x, sums[t][i % 2]);
                }
            }
        }
        for (int t = 0; t < M; t++) {
            float all[8], sum = 0;
            _mm256_storeu_ps(all, _mm256_add_ps(sums[t][0], sums[t][1]));
            for (float each : all) sum += each;
            d.y[t * d.rows + row] = sum;
        }
        dense_rest(d, row, k);
    }
}

template <int M>
QMIX_AVX512 void dense_rows_avx512(const DenseMatmul& d, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const uint16_t* w = d.weight + row * d.inputs;
        __m512 sums[M][2];
        for (int t = 0; t < M; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= d.inputs; k += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(w + k) + 2048, _MM_HINT_T1);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k + 16 * i));
                const __m512 values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
                for (int t = 0; t < M; t++) {
                    const __m512 x = _mm512_loadu_ps(d.x + t * d.inputs + k + 16 * i);
                    sums[t][i] = _mm512_fmadd_ps(values, x, sums[t][i]);
                }
            }
        }
        for (int t = 0; t < M; t++)
            d.y[t * d.rows + row] = _mm512_reduce_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]));
        dense_rest(d, row, k);
    }
}

#endif

#if defined(__x86_64__)
QMIX_AVX2 void norm_avx2(const uint16_t* x, const uint16_t* w, int64_t width, float eps, uint16_t* y) {
    norm_values(x, w, width, eps, y);
}
#endif

void norm(const uint16_t* x, const uint16_t* w, int64_t width, float eps, int32_t isa, uint16_t* y) {
#if defined(__x86_64__)
    if (isa >= AVX2) return norm_avx2(x, w, width, eps, y);
#endif
    (void)isa;
    norm_values(x, w, width, eps, y);
}

void dense_rows(const DenseMatmul& d, int32_t isa, int64_t first, int64_t end) {
#if defined(__x86_64__)
    if (isa >= AVX512)
        return d.tokens == 1 ? dense_rows_avx512<1>(d, first, end) : dense_rows_avx512<2>(d, first, end);
    if (isa == AVX2)
        return d.tokens == 1 ? dense_rows_avx2<1>(d, first, end) : dense_rows_avx2<2>(d, first, end);
#endif
    (void)isa;
    dense_rows_portable(d, first, end);
}

}  // namespace
