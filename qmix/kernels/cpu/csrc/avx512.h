// The matmul kernels for AVX-512: sixteen values a register, the table in one.
// What each function computes is said in portable.h.

#pragma once

#include "matrix.h"

#if defined(__AVX512F__)
namespace {

struct Avx512 {
    static constexpr bool VECTORS = true, INT16 = false, INT16_TILES = false;
    static constexpr bool BFLOAT16_TILES = false;
    static constexpr int64_t BFLOAT16_ROWS = 0, BFLOAT16_TOKENS = 0;
    static constexpr int64_t lanes(int64_t tokens) { return tokens <= 16 ? 16 : PANEL_TOKENS; }

    // The values of the p-th codes of sixteen words.
    template <int BITS>
    static inline __m512 values_of(__m512 table, __m512i words, int p) {
        const __m512i index = _mm512_srli_epi32(words, BITS * p);
        if (BITS == 8) return _mm512_cvtepi32_ps(_mm512_and_si512(index, _mm512_set1_epi32(255)));
        return _mm512_permutexvar_ps(index, table);
    }

    // Which of the scales of a chunk each of its sixteen words has.
    template <int WORD>
    static inline __m512i scale_index(int64_t unit) {
        const __m512i word =
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_srl_epi32(word, _mm_cvtsi64_si128(__builtin_ctzll(unit / WORD)));
    }

    static inline __m512 spread(const float* scales, __m512i index) {
        return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(scales)));
    }

    template <class Format>
    static void decode_chunk(const Matrix& weight, const uint8_t* codes, int64_t unit,
                                         const float* scales, const float* shifts, float* out) {
        const __m512 table = _mm512_loadu_ps(weight.table);
        const __m512i index = scale_index<Format::WORD>(unit);
        __m512i words = _mm512_loadu_si512(codes);
        __m512 scale = spread(scales, index), shift = _mm512_setzero_ps();
        if (Format::SHIFT != NONE) shift = spread(shifts, index);
#pragma GCC unroll 8
        for (int p = 0; p < Format::WORD; p++) {
            __m512 value = values_of<Format::BITS>(table, words, p);
            if (Format::SHIFT != BIASES) value = _mm512_sub_ps(value, shift);
            value = _mm512_mul_ps(value, scale);
            if (Format::SHIFT == BIASES) value = _mm512_add_ps(value, shift);
            _mm512_storeu_ps(out + 16 * p, value);
        }
    }

    template <class Format, int TOKENS>
    static void multiply_row(const Matrix& weight, const uint8_t* codes, const float* x,
                                         int64_t pitch, int64_t row, int64_t unit,
                                         const Scratch& scratch, float* y) {
        constexpr int64_t CHUNK = Format::CHUNK;
        const __m512 table = _mm512_loadu_ps(weight.table);
        const __m512i index = scale_index<Format::WORD>(unit);
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK;
        const int64_t tail = weight.inputs % CHUNK, units = CHUNK / unit;
        uint8_t last[CHUNK_BYTES] = {};
        __m512 sums[TOKENS];
        for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_setzero_ps();
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* source = codes + c * CHUNK_BYTES;
            if (tail && c == chunks - 1)
                source = static_cast<uint8_t*>(memcpy(last, source, tail * Format::BITS / 8));
            prefetch_codes(source);
            __m512i words = _mm512_loadu_si512(source);
            __m512 scale = spread(scratch.scales + c * units, index);
            __m512 shift = _mm512_setzero_ps(), chunk_sums[TOKENS];
            if (Format::SHIFT != NONE) shift = spread(scratch.shifts + c * units, index);
            for (int t = 0; t < TOKENS; t++) chunk_sums[t] = _mm512_setzero_ps();
            const float* inputs = x + c * CHUNK;
#pragma GCC unroll 8
            for (int p = 0; p < Format::WORD; p++) {
                __m512 value = values_of<Format::BITS>(table, words, p);
                if (Format::SHIFT == ZEROS) value = _mm512_sub_ps(value, shift);
                if (Format::SHIFT == BIASES) value = _mm512_fmadd_ps(value, scale, shift);
                for (int t = 0; t < TOKENS; t++)
                    chunk_sums[t] = _mm512_fmadd_ps(
                        value, _mm512_loadu_ps(inputs + t * pitch + 16 * p), chunk_sums[t]);
            }
            for (int t = 0; t < TOKENS; t++)
                sums[t] = Format::SHIFT == BIASES ? _mm512_add_ps(chunk_sums[t], sums[t])
                                                  : _mm512_fmadd_ps(chunk_sums[t], scale, sums[t]);
        }
        for (int t = 0; t < TOKENS; t++) y[t * weight.rows + row] = _mm512_reduce_add_ps(sums[t]);
    }

    // A register tile: sums [ROWS][VECTORS_A_ROW] += tile [ROWS, depth] times x [depth][lanes].
    template <int ROWS, int VECTORS_A_ROW>
    static void multiply_block(const float* tile, int64_t depth, const float* x,
                                           float* sums) {
        constexpr int V = VECTORS_A_ROW;
        __m512 sum[ROWS][V];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) sum[r][v] = _mm512_loadu_ps(sums + 16 * (V * r + v));
        for (int64_t k = 0; k < depth; k++) {
            __m512 inputs[V];
            for (int v = 0; v < V; v++) inputs[v] = _mm512_loadu_ps(x + 16 * (V * k + v));
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                __m512 value = _mm512_set1_ps(tile[r * TILE_PITCH + k]);
                for (int v = 0; v < V; v++)
                    sum[r][v] = _mm512_fmadd_ps(value, inputs[v], sum[r][v]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + 16 * (V * r + v), sum[r][v]);
    }

    static void multiply_tile(const float* tile, int64_t rows, int64_t depth, const float* x,
                              int64_t lanes, float* sums) {
        for (int64_t r = 0; r < rows; r += 12)
            if (lanes == 16)
                multiply_block<12, 1>(tile + r * TILE_PITCH, depth, x, sums + 16 * r);
            else
                multiply_block<12, 2>(tile + r * TILE_PITCH, depth, x, sums + 32 * r);
    }
};

}  // namespace
#endif
