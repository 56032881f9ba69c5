// The matmul kernels for AVX2: eight values a register, a look-up in two halves of the table.
// What each function computes is said in portable.h.

#pragma once

#include "matrix.h"

#if defined(__x86_64__)
namespace {

struct Avx2 {
    static constexpr bool VECTORS = true, INT16 = false;
    static constexpr int64_t lanes(int64_t tokens) { return tokens <= 8 ? 8 : 16; }

    struct Table {
        __m256 low, high;
    };

    // The values of the codes at bits 4 p of eight words. The highest bit of a code, shifted to the
    // sign, chooses between the halves of the table.
    static inline QMIX_AVX2 __m256 values_of(const Table& table, __m256i words, int p) {
        __m256i index = _mm256_srli_epi32(words, 4 * p);
        __m256 low = _mm256_permutevar8x32_ps(table.low, index);
        __m256 high = _mm256_permutevar8x32_ps(table.high, index);
        __m256i sign = _mm256_slli_epi32(words, 28 - 4 * p);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(sign));
    }

    // Which of the scales of half a chunk each of its eight words has.
    static inline QMIX_AVX2 __m256i scale_index(int64_t unit) {
        return unit == 32 ? _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1) : _mm256_setzero_si256();
    }

    static inline QMIX_AVX2 __m256 spread(const float* scales, __m256i index) {
        return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales)), index);
    }

    static QMIX_AVX2 void decode_chunk(const Matrix& weight, const uint8_t* codes, int64_t unit,
                                       const float* scales, const float* zeros, float* out) {
        const Table table = {_mm256_loadu_ps(weight.table), _mm256_loadu_ps(weight.table + 8)};
        const __m256i index = scale_index(unit);
        for (int64_t half = 0; half < 2; half++) {
            __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * half));
            __m256 scale = spread(scales + 64 * half / unit, index);
            __m256 zero = zeros ? spread(zeros + 64 * half / unit, index) : _mm256_setzero_ps();
            float* target = out + 8 * half;
#pragma GCC unroll 8
            for (int p = 0; p < 8; p++) {
                __m256 value = _mm256_sub_ps(values_of(table, words, p), zero);
                _mm256_storeu_ps(target + 16 * p, _mm256_mul_ps(value, scale));
            }
        }
    }

    template <int TOKENS, bool ZEROS>
    static QMIX_AVX2 void multiply_row(const Matrix& weight, const float* x, int64_t pitch,
                                       int64_t row, int64_t unit, const Scratch& scratch,
                                       float* y) {
        const Table table = {_mm256_loadu_ps(weight.table), _mm256_loadu_ps(weight.table + 8)};
        const __m256i index = scale_index(unit);
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK;
        const int64_t tail = weight.inputs % CHUNK;
        const uint8_t* codes = weight.codes + row * (weight.inputs / 2);
        uint8_t last[CHUNK_BYTES] = {};
        __m256 sums[TOKENS];
        for (int t = 0; t < TOKENS; t++) sums[t] = _mm256_setzero_ps();
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* source = codes + c * CHUNK_BYTES;
            if (tail && c == chunks - 1)
                source = static_cast<uint8_t*>(memcpy(last, source, tail / 2));
            prefetch_codes(source);
            for (int64_t half = 0; half < 2; half++) {
                __m256i words =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + 32 * half));
                int64_t first = (c * CHUNK + 64 * half) / unit;
                __m256 scale = spread(scratch.scales + first, index);
                __m256 zero = _mm256_setzero_ps(), half_sums[TOKENS];
                if (ZEROS) zero = spread(scratch.zeros + first, index);
                for (int t = 0; t < TOKENS; t++) half_sums[t] = _mm256_setzero_ps();
                const float* inputs = x + c * CHUNK + 8 * half;
#pragma GCC unroll 8
                for (int p = 0; p < 8; p++) {
                    __m256 value = values_of(table, words, p);
                    if (ZEROS) value = _mm256_sub_ps(value, zero);
                    for (int t = 0; t < TOKENS; t++)
                        half_sums[t] = _mm256_fmadd_ps(
                            value, _mm256_loadu_ps(inputs + t * pitch + 16 * p), half_sums[t]);
                }
                for (int t = 0; t < TOKENS; t++)
                    sums[t] = _mm256_fmadd_ps(half_sums[t], scale, sums[t]);
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            float lanes[8], sum = 0;
            _mm256_storeu_ps(lanes, sums[t]);
            for (float lane : lanes) sum += lane;
            y[t * weight.rows + row] = sum;
        }
    }

    // A register tile: sums [ROWS][VECTORS_A_ROW] += tile [ROWS, depth] times x [depth][lanes].
    template <int ROWS, int VECTORS_A_ROW>
    static QMIX_AVX2 void multiply_block(const float* tile, int64_t depth, const float* x,
                                         float* sums) {
        constexpr int V = VECTORS_A_ROW;
        __m256 sum[ROWS][V];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) sum[r][v] = _mm256_loadu_ps(sums + 8 * (V * r + v));
        for (int64_t k = 0; k < depth; k++) {
            __m256 inputs[V];
            for (int v = 0; v < V; v++) inputs[v] = _mm256_loadu_ps(x + 8 * (V * k + v));
            for (int r = 0; r < ROWS; r++) {
                __m256 value = _mm256_broadcast_ss(tile + r * TILE_PITCH + k);
                for (int v = 0; v < V; v++)
                    sum[r][v] = _mm256_fmadd_ps(value, inputs[v], sum[r][v]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) _mm256_storeu_ps(sums + 8 * (V * r + v), sum[r][v]);
    }

    static QMIX_AVX2 void swiglu(const float* gate, const float* up, int64_t count, float* out) {
        swiglu_values(gate, up, count, out);
    }

    static void multiply_tile(const float* tile, int64_t rows, int64_t depth, const float* x,
                              int64_t lanes, float* sums) {
        if (lanes == 8)
            for (int64_t r = 0; r < rows; r += 12)
                multiply_block<12, 1>(tile + r * TILE_PITCH, depth, x, sums + 8 * r);
        else
            for (int64_t r = 0; r < rows; r += 6)
                multiply_block<6, 2>(tile + r * TILE_PITCH, depth, x, sums + 16 * r);
    }
};

}  // namespace
#endif
