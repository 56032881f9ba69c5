// What stays in bfloat16, for a few tokens: matmuls, whose matrix is read once, row after row, at the
// pace of the memory, and norms, in one pass where torch takes seven.

#pragma once

#include "float_math.h"
#include "structs.h"

namespace {

// w * (x * (1 / sqrt(mean(x^2) + eps))), rounded before and after w is multiplied.
void rms_norm(const uint16_t* x, const uint16_t* w, int64_t width, float eps,
                                 uint16_t* y) {
    float sums[16] = {}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        for (int lane = 0; lane < 16; lane++)
            sums[lane] += bfloat16_to_float(x[i + lane]) * bfloat16_to_float(x[i + lane]);
    for (; i < width; i++) sum += bfloat16_to_float(x[i]) * bfloat16_to_float(x[i]);
    for (float lane : sums) sum += lane;
    const float scale = 1 / __builtin_sqrtf(sum / float(width) + eps);
    for (int64_t k = 0; k < width; k++) {
        const uint16_t normed = float_to_bfloat16(bfloat16_to_float(x[k]) * scale);
        y[k] = float_to_bfloat16(bfloat16_to_float(w[k]) * bfloat16_to_float(normed));
    }
}

// Adds inputs [first, inputs) of a row to y, for all tokens.
inline void multiply_dense_tail(const DenseMatmul& matmul, int64_t row, int64_t first) {
    for (int64_t t = 0; t < matmul.tokens; t++)
        for (int64_t k = first; k < matmul.inputs; k++)
            matmul.y[t * matmul.rows + row] +=
                bfloat16_to_float(matmul.weight[row * matmul.inputs + k]) *
                matmul.x[t * matmul.inputs + k];
}

#if defined(__AVX512F__)

template <int TOKENS>
void multiply_dense_rows(const DenseMatmul& matmul, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const uint16_t* weight = matmul.weight + row * matmul.inputs;
        __m512 sums[TOKENS][2];
        for (int t = 0; t < TOKENS; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= matmul.inputs; k += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(weight + k) + 2048, _MM_HINT_T1);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const __m256i bits =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k + 16 * i));
                const __m512 values =
                    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
                for (int t = 0; t < TOKENS; t++) {
                    const __m512 x = _mm512_loadu_ps(matmul.x + t * matmul.inputs + k + 16 * i);
                    sums[t][i] = _mm512_fmadd_ps(values, x, sums[t][i]);
                }
            }
        }
        for (int t = 0; t < TOKENS; t++)
            matmul.y[t * matmul.rows + row] =
                _mm512_reduce_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]));
        multiply_dense_tail(matmul, row, k);
    }
}

#elif defined(__AVX2__)

template <int TOKENS>
void multiply_dense_rows(const DenseMatmul& matmul, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const uint16_t* weight = matmul.weight + row * matmul.inputs;
        __m256 sums[TOKENS][2];
        for (int t = 0; t < TOKENS; t++) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= matmul.inputs; k += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(weight + k) + 2048, _MM_HINT_T1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m128i bits =
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + k + 8 * i));
                const __m256 values =
                    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
                for (int t = 0; t < TOKENS; t++) {
                    const __m256 x = _mm256_loadu_ps(matmul.x + t * matmul.inputs + k + 8 * i);
                    sums[t][i % 2] = _mm256_fmadd_ps(values, x, sums[t][i % 2]);
                }
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            float lanes[8], sum = 0;
            _mm256_storeu_ps(lanes, _mm256_add_ps(sums[t][0], sums[t][1]));
            for (float lane : lanes) sum += lane;
            matmul.y[t * matmul.rows + row] = sum;
        }
        multiply_dense_tail(matmul, row, k);
    }
}

#else

template <int TOKENS>
void multiply_dense_rows(const DenseMatmul& matmul, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const uint16_t* weight = matmul.weight + row * matmul.inputs;
        Floats sums[TOKENS] = {};
        int64_t k = 0;
        for (; k + 16 <= matmul.inputs; k += 16)
            for (int t = 0; t < TOKENS; t++)
                sums[t] += load16(weight + k) * load16(matmul.x + t * matmul.inputs + k);
        for (int t = 0; t < TOKENS; t++) matmul.y[t * matmul.rows + row] = sum16(sums[t]);
        multiply_dense_tail(matmul, row, k);
    }
}

#endif

// Rows [first, end). Four tokens share what is loaded; where there are more, the next four find a few
// rows in the cache. A token's sums do not depend on how many tokens there are.
void multiply_dense(const DenseMatmul& matmul, int64_t first, int64_t end) {
    const int64_t step = matmul.tokens > 4 ? 4 : end - first;
    for (int64_t row = first; row < end; row += step) {
        const int64_t last = row + step < end ? row + step : end;
        DenseMatmul part = matmul;
        for (int64_t left = matmul.tokens; left; left -= part.tokens) {
            part.x = matmul.x + (matmul.tokens - left) * matmul.inputs;
            part.y = matmul.y + (matmul.tokens - left) * matmul.rows;
            part.tokens = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            if (part.tokens == 4) multiply_dense_rows<4>(part, row, last);
            if (part.tokens == 2) multiply_dense_rows<2>(part, row, last);
            if (part.tokens == 1) multiply_dense_rows<1>(part, row, last);
        }
    }
}

}  // namespace
