// The matmul kernels for AVX2: eight values a register, a look-up in two halves of the table.
// What each function computes is said in portable.h.

#pragma once

#include "matrix.h"

#if defined(__AVX2__)
namespace {

struct Avx2 {
    static constexpr bool VECTORS = true, INT16 = false, INT16_TILES = false;
    static constexpr bool BFLOAT16_TILES = false;
    static constexpr int64_t BFLOAT16_ROWS = 0, BFLOAT16_TOKENS = 0;
    static constexpr int64_t lanes(int64_t tokens) { return tokens <= 8 ? 8 : 16; }

    struct Table {
        __m256 low, high;
    };

    // The values of the p-th codes of eight words. The highest bit of a code of 4 bits, shifted to
    // the sign, chooses between the halves of the table.
    template <int BITS>
    static inline __m256 values_of(const Table& table, __m256i words, int p) {
        __m256i index = _mm256_srli_epi32(words, BITS * p);
        if (BITS == 8) return _mm256_cvtepi32_ps(_mm256_and_si256(index, _mm256_set1_epi32(255)));
        __m256 low = _mm256_permutevar8x32_ps(table.low, index);
        __m256 high = _mm256_permutevar8x32_ps(table.high, index);
        __m256i sign = _mm256_slli_epi32(words, 28 - 4 * p);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(sign));
    }

    // Which of the scales of half a chunk each of its eight words has.
    template <int WORD>
    static inline __m256i scale_index(int64_t unit) {
        const __m128i shift = _mm_cvtsi64_si128(__builtin_ctzll(unit / WORD));
        return _mm256_srl_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), shift);
    }

    static inline __m256 spread(const float* scales, __m256i index) {
        return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales)), index);
    }

    template <class Format>
    static void decode_chunk(const Matrix& weight, const uint8_t* codes, int64_t unit,
                                       const float* scales, const float* shifts, float* out) {
        constexpr int64_t HALF = Format::CHUNK / 2;
        const Table table = {_mm256_loadu_ps(weight.table), _mm256_loadu_ps(weight.table + 8)};
        const __m256i index = scale_index<Format::WORD>(unit);
        for (int64_t half = 0; half < 2; half++) {
            __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * half));
            __m256 scale = spread(scales + HALF * half / unit, index);
            __m256 shift = _mm256_setzero_ps();
            if (Format::SHIFT != NONE) shift = spread(shifts + HALF * half / unit, index);
            float* target = out + 8 * half;
#pragma GCC unroll 8
            for (int p = 0; p < Format::WORD; p++) {
                __m256 value = values_of<Format::BITS>(table, words, p);
                if (Format::SHIFT != BIASES) value = _mm256_sub_ps(value, shift);
                value = _mm256_mul_ps(value, scale);
                if (Format::SHIFT == BIASES) value = _mm256_add_ps(value, shift);
                _mm256_storeu_ps(target + 16 * p, value);
            }
        }
    }

    template <class Format, int TOKENS>
    static void multiply_row(const Matrix& weight, const uint8_t* codes, const float* x,
                                       int64_t pitch, int64_t row, int64_t unit,
                                       const Scratch& scratch, float* y) {
        constexpr int64_t CHUNK = Format::CHUNK;
        const Table table = {_mm256_loadu_ps(weight.table), _mm256_loadu_ps(weight.table + 8)};
        const __m256i index = scale_index<Format::WORD>(unit);
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK;
        const int64_t tail = weight.inputs % CHUNK;
        uint8_t last[CHUNK_BYTES] = {};
        __m256 sums[TOKENS];
        for (int t = 0; t < TOKENS; t++) sums[t] = _mm256_setzero_ps();
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* source = codes + c * CHUNK_BYTES;
            if (tail && c == chunks - 1)
                source = static_cast<uint8_t*>(memcpy(last, source, tail * Format::BITS / 8));
            prefetch_codes(source);
            for (int64_t half = 0; half < 2; half++) {
                __m256i words =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + 32 * half));
                int64_t first = (c * CHUNK + CHUNK / 2 * half) / unit;
                __m256 scale = spread(scratch.scales + first, index);
                __m256 shift = _mm256_setzero_ps(), half_sums[TOKENS];
                if (Format::SHIFT != NONE) shift = spread(scratch.shifts + first, index);
                for (int t = 0; t < TOKENS; t++) half_sums[t] = _mm256_setzero_ps();
                const float* inputs = x + c * CHUNK + 8 * half;
#pragma GCC unroll 8
                for (int p = 0; p < Format::WORD; p++) {
                    __m256 value = values_of<Format::BITS>(table, words, p);
                    if (Format::SHIFT == ZEROS) value = _mm256_sub_ps(value, shift);
                    if (Format::SHIFT == BIASES) value = _mm256_fmadd_ps(value, scale, shift);
                    for (int t = 0; t < TOKENS; t++)
                        half_sums[t] = _mm256_fmadd_ps(
                            value, _mm256_loadu_ps(inputs + t * pitch + 16 * p), half_sums[t]);
                }
                for (int t = 0; t < TOKENS; t++)
                    sums[t] = Format::SHIFT == BIASES
                                  ? _mm256_add_ps(half_sums[t], sums[t])
                                  : _mm256_fmadd_ps(half_sums[t], scale, sums[t]);
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
    static void multiply_block(const float* tile, int64_t depth, const float* x,
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
