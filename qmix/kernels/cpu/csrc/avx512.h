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
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] = _mm512_loadu_ps(sums + 16 * (V * r + v));
        for (int64_t k = 0; k < depth; k++) {
            __m512 inputs[V];
            for (int v = 0; v < V; v++) inputs[v] = _mm512_loadu_ps(x + 16 * (V * k + v));
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                __m512 value = _mm512_set1_ps(w[r * PITCH + k]);
                for (int v = 0; v < V; v++) sum[r][v] = _mm512_fmadd_ps(value, inputs[v], sum[r][v]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + 16 * (V * r + v), sum[r][v]);
    }

    static QMIX_AVX512 void gated(const float* gate, const float* up, int64_t count, float* out) {
        gated_values(gate, up, count, out);
    }

    static void tile(const float* w, int64_t rows, int64_t depth, const float* x, int64_t lanes, float* sums) {
        for (int64_t r = 0; r < rows; r += 12)
            if (lanes == 16)
                block<12, 1>(w + r * PITCH, depth, x, sums + 16 * r);
            else
                block<12, 2>(w + r * PITCH, depth, x, sums + 32 * r);
    }
};

// With the instructions that multiply pairs of 16-bit integers, or fours of 8-bit ones, and add them up.
struct Vnni : Avx512 {
    static constexpr bool INTEGERS = true;

    static inline QMIX_VNNI __m512i low_bytes(const __m512i (&dwords)[4], int shift) {
        __m512i bytes = _mm512_setzero_si512();
        bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[0], shift)), 0);
        bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[1], shift)), 1);
        bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[2], shift)), 2);
        return _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[3], shift)), 3);
    }

    // The inputs of a chunk, `held` of them, as integers in a rounded product's order, and of linear codes
    // their `totals` by units of `size`; returns what one is worth, NaN if any is none or infinite.
    static QMIX_VNNI float arrange(const float* x, int64_t held, int32_t high_first, const Integers& integers,
                                   int64_t size, int16_t* to, float* totals) {
        float rest[CHUNK] = {};
        if (held < CHUNK) x = static_cast<float*>(memcpy(rest, x, sizeof(float) * held));
        __m512 inputs[8], most = _mm512_setzero_ps();
        __mmask16 unsound = 0;
        for (int i = 0; i < 8; i++) {
            inputs[i] = _mm512_loadu_ps(x + 16 * i);
            unsound |= _mm512_fpclass_ps_mask(inputs[i], 0x99);  // no number, or infinite
            most = _mm512_max_ps(most, _mm512_abs_ps(inputs[i]));
        }
        const float largest = _mm512_reduce_max_ps(most), by = largest > 0 ? integers.largest_input / largest : 0;
        if (integers.linear) memset(totals, 0, sizeof(float) * 4);
        if (unsound || by > 3e38f) {
            memset(to, 0, sizeof(int16_t) * CHUNK);
            return unsound ? __builtin_nanf("") : 0;
        }
        __m512i words[4], raised[4];
        for (int i = 0; i < 4; i++) {
            const __m512 first = _mm512_mul_ps(inputs[2 * i], _mm512_set1_ps(by));
            const __m512 second = _mm512_mul_ps(inputs[2 * i + 1], _mm512_set1_ps(by));
            words[i] = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(first))),
                _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(second)), 1);
            raised[i] = _mm512_add_epi16(words[i], _mm512_set1_epi16(128));
            if (integers.linear)
                totals[32 * i / size] += float(_mm512_reduce_add_epi32(_mm512_madd_epi16(words[i], _mm512_set1_epi16(1))));
        }
        if (integers.linear) {  // 256 high + low, both signed bytes: even inputs' and odd ones'
            const int even = high_first ? 16 : 0, odd = 16 - even;
            _mm512_storeu_si512(to, low_bytes(raised, even + 8));
            _mm512_storeu_si512(to + 32, low_bytes(raised, odd + 8));
            _mm512_storeu_si512(to + 64, low_bytes(words, even));
            _mm512_storeu_si512(to + 96, low_bytes(words, odd));
            return largest / integers.largest_input;
        }
        // Every fourth: words 0 to 15 out of the first two, 16 to 31 out of the others.
        alignas(64) int16_t fourths[32];
        for (int i = 0; i < 32; i++) fourths[i] = int16_t(4 * (i % 16));
        const __m512i every = _mm512_load_si512(fourths);
        for (int p = 0; p < 4; p++) {
            const __m512i which = _mm512_add_epi16(every, _mm512_set1_epi16(int16_t(high_first ? p ^ 1 : p)));
            const __m512i low = _mm512_permutex2var_epi16(words[0], which, words[1]);
            const __m512i high = _mm512_permutex2var_epi16(words[2], which, words[3]);
            _mm512_storeu_si512(to + 32 * p, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
        }
        return largest / (integers.largest_input * integers.by);
    }

    // Each code looked up as a 16-bit integer, times 16-bit inputs.
    struct Looked {
        static constexpr bool ZEROS = false;
        __m512i table;
        template <int M>
        inline __attribute__((always_inline)) QMIX_VNNI void sums(__m512i words, const int16_t* x, int64_t pitch, __m512i (&sums)[M]) const {
            for (int t = 0; t < M; t++) sums[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                const __m512i values = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * p), table);
                for (int t = 0; t < M; t++)
                    sums[t] = _mm512_dpwssd_epi32(sums[t], values, _mm512_loadu_si512(x + t * pitch + 32 * p));
            }
        }
    };

    // Codes as they are, times the inputs' high bytes and low bytes.
    template <bool HAS_ZEROS>
    struct Linear {
        static constexpr bool ZEROS = HAS_ZEROS;
        template <int M>
        inline __attribute__((always_inline)) QMIX_VNNI void sums(__m512i words, const int16_t* x, int64_t pitch, __m512i (&sums)[M]) const {
            const __m512i nibble = _mm512_set1_epi8(15), first = _mm512_and_si512(words, nibble);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble);
#pragma GCC unroll 4
            for (int t = 0; t < M; t++, x += pitch) {
                sums[t] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(x));
                sums[t] = _mm512_slli_epi32(_mm512_dpbusd_epi32(sums[t], second, _mm512_loadu_si512(x + 32)), 8);
                sums[t] = _mm512_dpbusd_epi32(sums[t], first, _mm512_loadu_si512(x + 64));
                sums[t] = _mm512_dpbusd_epi32(sums[t], second, _mm512_loadu_si512(x + 96));
            }
        }
    };

    // The scales of a row's units, so many, and zeros behind them.
    static inline QMIX_VNNI void fetch_scales(const Matrix& m, int64_t size, int64_t row, int64_t count, float* scales,
                                              float* zeros) {
        const int64_t at = row * m.inputs / m.block, whole = count / 16 * 16;
        if (size != m.block || (m.scale_kind == NESTED && at % 16))
            return read_scales<Vnni>(m, size, row, 0, count, count + 16, scales, zeros);
        const uint16_t* bits = static_cast<const uint16_t*>(m.scales) + at;
        if (m.scale_kind == FLOAT16) {
            for (int64_t i = 0; i < whole; i += 16)
                _mm512_storeu_ps(scales + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + i))));
        } else if (m.scale_kind == FLOAT32) {
            for (int64_t i = 0; i < whole; i += 16)
                _mm512_storeu_ps(scales + i, _mm512_loadu_ps(static_cast<const float*>(m.scales) + at + i));
        } else if (m.scale_kind == NESTED) {
            const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + at;
            for (int64_t i = 0; i < whole; i += 16) {
                const __m128i which = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
                __m512 values = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(which), m.nested_map, 4);
                values = _mm512_mul_ps(values, _mm512_set1_ps(m.nested_absmax[(at + i) / NESTED_BLOCK]));
                _mm512_storeu_ps(scales + i, _mm512_add_ps(values, _mm512_set1_ps(m.offset)));
            }
        } else {
            copy_scales(m, at, whole, scales);
        }
        copy_scales(m, at + whole, count - whole, scales + whole);
        _mm512_storeu_ps(scales + count, _mm512_setzero_ps());
        if (!zeros) return;
        for (int64_t i = 0; i < count; i++) zeros[i] = m.zeros[at + i];
        _mm512_storeu_ps(zeros + count, _mm512_setzero_ps());
    }

    // Rows [first, end), R at a time, times M tokens: the more rows, the fewer loads of inputs; the more
    // tokens, the fewer look-ups.
    template <int R, int M, bool LINEAR, class Codes>
    static QMIX_VNNI void block(const Matrix& m, const Codes& codes_of, float base, int64_t size, const Inputs in,
                                int64_t first, int64_t end, const Scratch own, float* y) {
        const Codes kind = codes_of;
        const __m512i which = Avx512::spread(size);
        const int64_t chunks = up(m.inputs, CHUNK) / CHUNK, units = CHUNK / size;
        const int64_t bytes = m.inputs / 2, held = m.inputs / size, pitch = own.pitch;
        uint8_t last[R][BYTES] = {};
        for (int64_t row = first; row < end; row += R) {
            for (int r = 0; r < R; r++) {
                scales_ahead(m, row + r + 8);
                fetch_scales(m, size, row + r, held, own.scales + r * pitch, Codes::ZEROS ? own.zeros + r * pitch : nullptr);
            }
            __m512 all[R][M];
            __m128 offsets[R][M];  // scale * (what code 0 stands for) * the inputs' total
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                for (int t = 0; t < M; t++) all[r][t] = _mm512_setzero_ps(), offsets[r][t] = _mm_setzero_ps();
            // All whole chunks, and then a copy of the codes of one that is not: reading on would leave the matrix.
            const uint8_t* codes[R];
            for (int r = 0; r < R; r++) codes[r] = m.codes + (row + r) * bytes;
            for (int64_t c = 0, stop = m.inputs / CHUNK; c < chunks; stop = chunks) {
                if (c == m.inputs / CHUNK)
                    for (int r = 0; r < R; r++) {
                        memcpy(last[r], codes[r] + c * BYTES, m.inputs % CHUNK / 2);
                        codes[r] = last[r] - c * BYTES;
                    }
                for (; c < stop; c++) {
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) {
                        const uint8_t* from = codes[r] + c * BYTES;
                        // To the second cache, or the few lines that the first one can wait for are the bound.
                        _mm_prefetch(reinterpret_cast<const char*>(from + R * bytes), _MM_HINT_T1);
                        __m512i sums[M];
                        kind.sums(_mm512_loadu_si512(from), in.x + c * CHUNK, chunks * CHUNK, sums);
                        const int64_t unit = r * pitch + c * units;
#pragma GCC unroll 4
                        for (int t = 0; t < M; t++) {
                            __m128 scaled = _mm_mul_ps(_mm_loadu_ps(own.scales + unit), _mm_set1_ps(in.scales[t * chunks + c]));
                            const __m512 scale = _mm512_permutexvar_ps(which, _mm512_castps128_ps512(scaled));
                            all[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), scale, all[r][t]);
                            if (!LINEAR) continue;
                            if (Codes::ZEROS)
                                scaled = _mm_mul_ps(scaled, _mm_sub_ps(_mm_set1_ps(base), _mm_loadu_ps(own.zeros + unit)));
                            const __m128 totals = _mm_loadu_ps(in.totals + (t * chunks + c) * 4);
                            offsets[r][t] = _mm_fmadd_ps(scaled, totals, offsets[r][t]);
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                for (int t = 0; t < M; t++) {
                    if (LINEAR && !Codes::ZEROS) offsets[r][t] = _mm_mul_ps(offsets[r][t], _mm_set1_ps(base));
                    if (LINEAR) all[r][t] = _mm512_add_ps(all[r][t], _mm512_zextps128_ps512(offsets[r][t]));
                    y[t * m.rows + row + r] = _mm512_reduce_add_ps(all[r][t]);
                }
        }
    }

    template <int R, bool LINEAR, class Codes>
    static void blocks(const Matrix& m, const Codes& kind, float base, int64_t size, Inputs in, int64_t first,
                       int64_t end, const Scratch& own, float* y) {
        const int64_t chunks = up(m.inputs, CHUNK) / CHUNK;
        for (int64_t t = 0; t < in.tokens; t += 4, y += 4 * m.rows) {
            switch (in.tokens - t) {
            case 1: block<R, 1, LINEAR>(m, kind, base, size, in, first, end, own, y); break;
            case 2: block<R, 2, LINEAR>(m, kind, base, size, in, first, end, own, y); break;
            case 3: block<R, 3, LINEAR>(m, kind, base, size, in, first, end, own, y); break;
            default: block<R, 4, LINEAR>(m, kind, base, size, in, first, end, own, y);
            }
            in.x += 4 * chunks * CHUNK, in.scales += 4 * chunks, in.totals += 16 * chunks;
        }
    }

    // Rows [first, end), R at a time, times all tokens.
    template <int R>
    static QMIX_VNNI void rounded(const Matrix& m, const Integers& integers, int64_t size, const Inputs& in,
                                  int64_t first, int64_t end, const Scratch& own, float* y) {
        const float base = integers.values[0];
        if (!integers.linear)
            blocks<R, false>(m, Looked{_mm512_loadu_si512(integers.values)}, base, size, in, first, end, own, y);
        else if (m.zeros)
            blocks<R, true>(m, Linear<true>{}, base, size, in, first, end, own, y);
        else
            blocks<R, true>(m, Linear<false>{}, base, size, in, first, end, own, y);
    }
};

}  // namespace
#endif
