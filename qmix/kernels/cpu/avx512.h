// The kernels for AVX-512: sixteen values a register, the table in one; or 32 values as 16-bit integers.

#pragma once

#include "matrix.h"

#if defined(__x86_64__)
namespace {

struct Avx512 {
    static constexpr bool VECTORS = true, INTEGERS = false;
    static constexpr int64_t lanes(int64_t tokens) { return tokens <= 16 ? 16 : WIDE; }

    static inline QMIX_AVX512 __m512i spread(int64_t size) {
        const __m512i word = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return size == 32 ? _mm512_srli_epi32(word, 2)
                          : size == 64 ? _mm512_srli_epi32(word, 3) : _mm512_setzero_si512();
    }

    static inline QMIX_AVX512 __m512 spread(const float* values, __m512i which) {
        return _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_loadu_ps(values)));
    }

    static QMIX_AVX512 void look_up(const Matrix& m, const uint8_t* codes, int64_t size, const float* scales,
                                    const float* zeros, float* out) {
        const __m512 table = _mm512_loadu_ps(m.table);
        const __m512i which = spread(size);
        __m512i words = _mm512_loadu_si512(codes);
        __m512 by = spread(scales, which), zero = zeros ? spread(zeros, which) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
            __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * p), table);
            _mm512_storeu_ps(out + 16 * p, _mm512_mul_ps(_mm512_sub_ps(value, zero), by));
        }
    }

    template <int M, bool ZEROS>
    static QMIX_AVX512 void row(const Matrix& m, const float* x, int64_t pitch, int64_t row, int64_t size,
                                const Scratch& own, float* y) {
        const __m512 table = _mm512_loadu_ps(m.table);
        const __m512i which = spread(size);
        const int64_t chunks = up(m.inputs, CHUNK) / CHUNK, tail = m.inputs % CHUNK, units = CHUNK / size;
        const uint8_t* codes = m.codes + row * (m.inputs / 2);
        uint8_t last[BYTES] = {};
        __m512 sums[M];
        for (int t = 0; t < M; t++) sums[t] = _mm512_setzero_ps();
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* from = codes + c * BYTES;
            if (tail && c == chunks - 1) from = static_cast<uint8_t*>(memcpy(last, from, tail / 2));
            ahead(from);
            __m512i words = _mm512_loadu_si512(from);
            __m512 by = spread(own.scales + c * units, which), zero = _mm512_setzero_ps(), chunk_sums[M];
            if (ZEROS) zero = spread(own.zeros + c * units, which);
            for (int t = 0; t < M; t++) chunk_sums[t] = _mm512_setzero_ps();
            const float* inputs = x + c * CHUNK;
#pragma GCC unroll 8
            for (int p = 0; p < 8; p++) {
                __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * p), table);
                if (ZEROS) value = _mm512_sub_ps(value, zero);
                for (int t = 0; t < M; t++)
                    chunk_sums[t] = _mm512_fmadd_ps(value, _mm512_loadu_ps(inputs + t * pitch + 16 * p), chunk_sums[t]);
            }
            for (int t = 0; t < M; t++) sums[t] = _mm512_fmadd_ps(chunk_sums[t], by, sums[t]);
        }
        for (int t = 0; t < M; t++) y[t * m.rows + row] = _mm512_reduce_add_ps(sums[t]);
    }

    static void direct(const Matrix& m, const float* x, int64_t pitch, int64_t tokens, int64_t at, int64_t size,
                       const Scratch& own, float* y) {
        switch (tokens + (m.zeros ? DIRECT : 0)) {
        case 1: return row<1, false>(m, x, pitch, at, size, own, y);
        case 2: return row<2, false>(m, x, pitch, at, size, own, y);
        case 3: return row<3, false>(m, x, pitch, at, size, own, y);
        case 4: return row<4, false>(m, x, pitch, at, size, own, y);
        case 5: return row<1, true>(m, x, pitch, at, size, own, y);
        case 6: return row<2, true>(m, x, pitch, at, size, own, y);
        case 7: return row<3, true>(m, x, pitch, at, size, own, y);
        default: return row<4, true>(m, x, pitch, at, size, own, y);
        }
    }

    template <int R, int V>
    static QMIX_AVX512 void block(const float* w, int64_t depth, const float* x, float* sums) {
        __m512 sum[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] = _mm512_loadu_ps(sums + 16 * (V * r + v));
        for (int64_t k = 0; k < depth; k++) {
            __m512 inputs[V];
            for (int v = 0; v < V; v++) inputs[v] = _mm512_loadu_ps(x + 16 * (V * k + v));
            for (int r = 0; r < R; r++) {
                __m512 value = _mm512_set1_ps(w[r * PITCH + k]);
                for (int v = 0; v < V; v++) sum[r][v] = _mm512_fmadd_ps(value, inputs[v], sum[r][v]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + 16 * (V * r + v), sum[r][v]);
    }

    static void tile(const float* w, int64_t rows, int64_t depth, const float* x, int64_t lanes, float* sums) {
        for (int64_t r = 0; r < rows; r += 12)
            if (lanes == 16)
                block<12, 1>(w + r * PITCH, depth, x, sums + 16 * r);
            else
                block<12, 2>(w + r * PITCH, depth, x, sums + 32 * r);
    }
};

// With the instruction that multiplies pairs of 16-bit integers and adds them up.
struct Vnni : Avx512 {
    static constexpr bool INTEGERS = true;

    // One row times M tokens in integers. x: [M, chunks * CHUNK], `by`: [M, units].
    template <int M, bool ZEROS>
    static QMIX_VNNI void rounded(const Matrix& m, const Integers& integers, const int16_t* x, const float* by,
                                    int64_t row, int64_t size, const Scratch& own, float* y) {
        const __m512i table = _mm512_loadu_si512(integers.values), which = Avx512::spread(size);
        const int64_t chunks = up(m.inputs, CHUNK) / CHUNK, tail = m.inputs % CHUNK, units = CHUNK / size;
        const uint8_t* codes = m.codes + row * (m.inputs / 2);
        uint8_t last[BYTES] = {};
        const int64_t pitch = m.inputs / size + 16;
        for (int t = 0; t < M; t++)
            for (int64_t u = 0; u < pitch; u++) own.scaled[t * pitch + u] = own.scales[u] * by[t * pitch + u];
        __m512 sums[M];
        for (int t = 0; t < M; t++) sums[t] = _mm512_setzero_ps();
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* from = codes + c * BYTES;
            if (tail && c == chunks - 1) from = static_cast<uint8_t*>(memcpy(last, from, tail / 2));
            ahead(from);
            const __m512i words = _mm512_loadu_si512(from);
            __m512i zero = _mm512_setzero_si512(), chunk_sums[M];
            if (ZEROS) {  // each twice, for both words of a lane
                zero = _mm512_cvtps_epi32(Avx512::spread(own.zeros + c * units, which));
                zero = _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16));
            }
            for (int t = 0; t < M; t++) chunk_sums[t] = _mm512_setzero_si512();
            const int16_t* inputs = x + c * CHUNK;
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                __m512i values = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * p), table);
                if (ZEROS) values = _mm512_sub_epi16(values, zero);
                for (int t = 0; t < M; t++) {
                    const __m512i with = _mm512_loadu_si512(inputs + t * chunks * CHUNK + 32 * p);
                    chunk_sums[t] = _mm512_dpwssd_epi32(chunk_sums[t], values, with);
                }
            }
            for (int t = 0; t < M; t++) {
                const __m512 scale = Avx512::spread(own.scaled + t * pitch + c * units, which);
                sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(chunk_sums[t]), scale, sums[t]);
            }
        }
        for (int t = 0; t < M; t++) y[t * m.rows + row] = _mm512_reduce_add_ps(sums[t]);
    }

    template <int M>
    static void rounded(const Matrix& m, const Integers& integers, const int16_t* x, const float* by, int64_t row,
                        int64_t size, const Scratch& own, float* y) {
        if (m.zeros) rounded<M, true>(m, integers, x, by, row, size, own, y);
        else rounded<M, false>(m, integers, x, by, row, size, own, y);
    }

    static void rounded(const Matrix& m, const Integers& integers, const int16_t* x, const float* by, int64_t tokens,
                        int64_t row, int64_t size, const Scratch& own, float* y) {
        const int64_t chunks = up(m.inputs, CHUNK) / CHUNK, pitch = m.inputs / size + 16;
        for (int64_t t = 0; t < tokens; t += 4) {
            const int16_t* from = x + t * chunks * CHUNK;
            const float* scales = by + t * pitch;
            float* to = y + t * m.rows;
            switch (tokens - t) {
            case 1: rounded<1>(m, integers, from, scales, row, size, own, to); break;
            case 2: rounded<2>(m, integers, from, scales, row, size, own, to); break;
            case 3: rounded<3>(m, integers, from, scales, row, size, own, to); break;
            default: rounded<4>(m, integers, from, scales, row, size, own, to);
            }
        }
    }
};

}  // namespace
#endif
