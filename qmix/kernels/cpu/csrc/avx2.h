// The kernels for AVX2: eight values a register, a look-up in two halves of the table.

#pragma once

#include "matrix.h"

#if defined(__x86_64__)
namespace {

struct Avx2 {
    static constexpr bool VECTORS = true, INTEGERS = false;
    static constexpr int64_t lanes(int64_t tokens) { return tokens <= 8 ? 8 : 16; }

    // The table's halves; a code's highest bit, brought to the sign, chooses between them.
    struct Table {
        __m256 low, high;
    };

    template <int P>
    static inline QMIX_AVX2 __m256 pick(const Table& table, __m256i words) {
        __m256i index = _mm256_srli_epi32(words, 4 * P);
        __m256 low = _mm256_permutevar8x32_ps(table.low, index);
        __m256 high = _mm256_permutevar8x32_ps(table.high, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * P)));
    }

    // Which of a half chunk's scales each word has.
    static inline QMIX_AVX2 __m256i spread(int64_t size) {
        return size == 32 ? _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1) : _mm256_setzero_si256();
    }

    static inline QMIX_AVX2 __m256 spread(const float* values, __m256i which) {
        return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(values)), which);
    }

    static QMIX_AVX2 void look_up(const Matrix& m, const uint8_t* codes, int64_t size, const float* scales,
                                  const float* zeros, float* out) {
        const Table table = {_mm256_loadu_ps(m.table), _mm256_loadu_ps(m.table + 8)};
        const __m256i which = spread(size);
        for (int64_t part = 0; part < 2; part++) {
            __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * part));
            __m256 by = spread(scales + 64 * part / size, which);
            __m256 zero = zeros ? spread(zeros + 64 * part / size, which) : _mm256_setzero_ps();
            float* to = out + 8 * part;
#define QMIX_STEP(P) \
    _mm256_storeu_ps(to + 16 * P, _mm256_mul_ps(_mm256_sub_ps(pick<P>(table, words), zero), by));
            QMIX_STEP(0) QMIX_STEP(1) QMIX_STEP(2) QMIX_STEP(3)
            QMIX_STEP(4) QMIX_STEP(5) QMIX_STEP(6) QMIX_STEP(7)
#undef QMIX_STEP
        }
    }

    template <int M, bool ZEROS>
    static QMIX_AVX2 void row(const Matrix& m, const float* x, int64_t pitch, int64_t row, int64_t size,
                              const Scratch& own, float* y) {
        const Table table = {_mm256_loadu_ps(m.table), _mm256_loadu_ps(m.table + 8)};
        const __m256i which = spread(size);
        const int64_t chunks = up(m.inputs, CHUNK) / CHUNK, tail = m.inputs % CHUNK;
        const uint8_t* codes = m.codes + row * (m.inputs / 2);
        uint8_t last[BYTES] = {};
        __m256 sums[M];
        for (int t = 0; t < M; t++) sums[t] = _mm256_setzero_ps();
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* from = codes + c * BYTES;
            if (tail && c == chunks - 1) from = static_cast<uint8_t*>(memcpy(last, from, tail / 2));
            ahead(from);
            for (int64_t part = 0; part < 2; part++) {
                __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * part));
                int64_t at = (c * CHUNK + 64 * part) / size;
                __m256 by = spread(own.scales + at, which), zero = _mm256_setzero_ps(), part_sums[M];
                if (ZEROS) zero = spread(own.zeros + at, which);
                for (int t = 0; t < M; t++) part_sums[t] = _mm256_setzero_ps();
                const float* inputs = x + c * CHUNK + 8 * part;
#define QMIX_STEP(P) { \
        __m256 value = pick<P>(table, words); \
        if (ZEROS) value = _mm256_sub_ps(value, zero); \
        for (int t = 0; t < M; t++) \
            part_sums[t] = _mm256_fmadd_ps(value, _mm256_loadu_ps(inputs + t * pitch + 16 * P), part_sums[t]); \
    }
                QMIX_STEP(0) QMIX_STEP(1) QMIX_STEP(2) QMIX_STEP(3)
                QMIX_STEP(4) QMIX_STEP(5) QMIX_STEP(6) QMIX_STEP(7)
#undef QMIX_STEP
                for (int t = 0; t < M; t++) sums[t] = _mm256_fmadd_ps(part_sums[t], by, sums[t]);
            }
        }
        for (int t = 0; t < M; t++) {
            float lanes[8], sum = 0;
            _mm256_storeu_ps(lanes, sums[t]);
            for (float each : lanes) sum += each;
            y[t * m.rows + row] = sum;
        }
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
    static QMIX_AVX2 void block(const float* w, int64_t depth, const float* x, float* sums) {
        __m256 sum[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] = _mm256_loadu_ps(sums + 8 * (V * r + v));
        for (int64_t k = 0; k < depth; k++) {
            __m256 inputs[V];
            for (int v = 0; v < V; v++) inputs[v] = _mm256_loadu_ps(x + 8 * (V * k + v));
            for (int r = 0; r < R; r++) {
                __m256 value = _mm256_broadcast_ss(w + r * PITCH + k);
                for (int v = 0; v < V; v++) sum[r][v] = _mm256_fmadd_ps(value, inputs[v], sum[r][v]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) _mm256_storeu_ps(sums + 8 * (V * r + v), sum[r][v]);
    }

    static QMIX_AVX2 void gated(const float* gate, const float* up, int64_t count, float* out) {
        gated_values(gate, up, count, out);
    }

    static void tile(const float* w, int64_t rows, int64_t depth, const float* x, int64_t lanes, float* sums) {
        if (lanes == 8)
            for (int64_t r = 0; r < rows; r += 12) block<12, 1>(w + r * PITCH, depth, x, sums + 8 * r);
        else
            for (int64_t r = 0; r < rows; r += 6) block<6, 2>(w + r * PITCH, depth, x, sums + 16 * r);
    }
};

}  // namespace
#endif
