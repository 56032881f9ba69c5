// AVX-512 with the instructions that multiply pairs of 16-bit integers, or fours of 8-bit ones, and
// add them up. Chunks here are 32 words of 4 codes; of a linear table, bytes of 2 codes.

#pragma once

#include "avx512.h"
#include "int16.h"

#if defined(__x86_64__)
namespace {

struct Vnni : Avx512 {
    static constexpr bool INT16 = true;

    // The low bytes of 64 dwords, each shifted right by `shift`.
    static inline QMIX_VNNI __m512i low_bytes(const __m512i (&dwords)[4], int shift) {
        __m512i bytes = _mm512_setzero_si512();
        const __m128i first = _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[0], shift));
        bytes = _mm512_inserti32x4(bytes, first, 0);
        const __m128i second = _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[1], shift));
        bytes = _mm512_inserti32x4(bytes, second, 1);
        const __m128i third = _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[2], shift));
        bytes = _mm512_inserti32x4(bytes, third, 2);
        const __m128i fourth = _mm512_cvtepi32_epi8(_mm512_srli_epi32(dwords[3], shift));
        return _mm512_inserti32x4(bytes, fourth, 3);
    }

    // Quantizes `count` inputs of a chunk to 16 bits, arranged as the codes are read, and for a
    // linear table adds them up by units into `totals`. Returns what 1 is worth: NaN if any input
    // is NaN or infinite.
    static QMIX_VNNI float quantize_chunk(const float* x, int64_t count, int32_t high_first,
                                          const IntegerTable& table, int64_t unit, int16_t* out,
                                          float* totals) {
        float padded[CHUNK] = {};
        if (count < CHUNK) x = static_cast<float*>(memcpy(padded, x, sizeof(float) * count));
        __m512 inputs[8], magnitudes = _mm512_setzero_ps();
        __mmask16 not_finite = 0;
        for (int i = 0; i < 8; i++) {
            inputs[i] = _mm512_loadu_ps(x + 16 * i);
            not_finite |= _mm512_fpclass_ps_mask(inputs[i], 0x99);
            magnitudes = _mm512_max_ps(magnitudes, _mm512_abs_ps(inputs[i]));
        }
        const float largest = _mm512_reduce_max_ps(magnitudes);
        const float factor = largest > 0 ? table.max_activation / largest : 0;
        if (table.linear) memset(totals, 0, sizeof(float) * 4);
        if (not_finite || factor > 3e38f) {
            memset(out, 0, sizeof(int16_t) * CHUNK);
            return not_finite ? __builtin_nanf("") : 0;
        }
        __m512i words[4], raised[4];
        for (int i = 0; i < 4; i++) {
            const __m512 first = _mm512_mul_ps(inputs[2 * i], _mm512_set1_ps(factor));
            const __m512 second = _mm512_mul_ps(inputs[2 * i + 1], _mm512_set1_ps(factor));
            words[i] = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(first))),
                _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(second)), 1);
            raised[i] = _mm512_add_epi16(words[i], _mm512_set1_epi16(128));
            if (table.linear)
                totals[32 * i / unit] += float(
                    _mm512_reduce_add_epi32(_mm512_madd_epi16(words[i], _mm512_set1_epi16(1))));
        }
        if (table.linear) {
            store_bytes(words, raised, high_first, out);
            return largest / table.max_activation;
        }
        store_fourths(words, high_first, out);
        return largest / (table.max_activation * table.factor);
    }

    // 256 high + low, both signed bytes: those of the even inputs and of the odd ones apart.
    static inline QMIX_VNNI void store_bytes(const __m512i (&words)[4], const __m512i (&raised)[4],
                                             int32_t high_first, int16_t* out) {
        const int even = high_first ? 16 : 0, odd = 16 - even;
        _mm512_storeu_si512(out, low_bytes(raised, even + 8));
        _mm512_storeu_si512(out + 32, low_bytes(raised, odd + 8));
        _mm512_storeu_si512(out + 64, low_bytes(words, even));
        _mm512_storeu_si512(out + 96, low_bytes(words, odd));
    }

    // Every fourth input: words 0 to 15 out of the first two registers, 16 to 31 out of the others.
    static inline QMIX_VNNI void store_fourths(const __m512i (&words)[4], int32_t high_first,
                                               int16_t* out) {
        alignas(64) int16_t fourths[32];
        for (int i = 0; i < 32; i++) fourths[i] = int16_t(4 * (i % 16));
        const __m512i every = _mm512_load_si512(fourths);
        for (int p = 0; p < 4; p++) {
            const __m512i index =
                _mm512_add_epi16(every, _mm512_set1_epi16(int16_t(high_first ? p ^ 1 : p)));
            const __m512i low = _mm512_permutex2var_epi16(words[0], index, words[1]);
            const __m512i high = _mm512_permutex2var_epi16(words[2], index, words[3]);
            _mm512_storeu_si512(out + 32 * p,
                                _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
        }
    }

    // Codes of any table: looked up as 16-bit integers, times 16-bit inputs.
    struct TableCodes {
        static constexpr bool ZEROS = false;
        __m512i table;
        template <int TOKENS>
        QMIX_INLINE QMIX_VNNI void multiply(__m512i words, const int16_t* x, int64_t pitch,
                                            __m512i (&sums)[TOKENS]) const {
            for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                const __m512i values =
                    _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * p), table);
                for (int t = 0; t < TOKENS; t++)
                    sums[t] = _mm512_dpwssd_epi32(sums[t], values,
                                                  _mm512_loadu_si512(x + t * pitch + 32 * p));
            }
        }
    };

    // Codes of a linear table: as they are, times the high bytes and the low bytes of the inputs.
    template <bool HAS_ZEROS>
    struct LinearCodes {
        static constexpr bool ZEROS = HAS_ZEROS;
        template <int TOKENS>
        QMIX_INLINE QMIX_VNNI void multiply(__m512i words, const int16_t* x, int64_t pitch,
                                            __m512i (&sums)[TOKENS]) const {
            const __m512i nibble = _mm512_set1_epi8(15), first = _mm512_and_si512(words, nibble);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++, x += pitch) {
                sums[t] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(x));
                sums[t] = _mm512_slli_epi32(
                    _mm512_dpbusd_epi32(sums[t], second, _mm512_loadu_si512(x + 32)), 8);
                sums[t] = _mm512_dpbusd_epi32(sums[t], first, _mm512_loadu_si512(x + 64));
                sums[t] = _mm512_dpbusd_epi32(sums[t], second, _mm512_loadu_si512(x + 96));
            }
        }
    };

    // Writes the scales, and the zeros if `zeros` is not null, of a row's `count` units, with 0.0
    // behind them.
    static inline QMIX_VNNI void read_row_scales(const Matrix& weight, int64_t unit, int64_t row,
                                                 int64_t count, float* scales, float* zeros) {
        const int64_t first = row * weight.inputs / weight.block, whole = count / 16 * 16;
        if (unit != weight.block || (weight.scale_kind == NESTED && first % 16))
            return read_scales<Vnni>(weight, unit, row, 0, count, count + 16, scales, zeros);
        const uint16_t* bits = static_cast<const uint16_t*>(weight.scales) + first;
        if (weight.scale_kind == FLOAT16) {
            for (int64_t i = 0; i < whole; i += 16) {
                const __m256i halves =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + i));
                _mm512_storeu_ps(scales + i, _mm512_cvtph_ps(halves));
            }
        } else if (weight.scale_kind == FLOAT32) {
            const float* source = static_cast<const float*>(weight.scales) + first;
            for (int64_t i = 0; i < whole; i += 16)
                _mm512_storeu_ps(scales + i, _mm512_loadu_ps(source + i));
        } else if (weight.scale_kind == NESTED) {
            const uint8_t* codes = static_cast<const uint8_t*>(weight.scales) + first;
            for (int64_t i = 0; i < whole; i += 16) {
                const __m512i index = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
                const float absmax = weight.nested_absmax[(first + i) / NESTED_BLOCK];
                __m512 values = _mm512_i32gather_ps(index, weight.nested_map, 4);
                values = _mm512_mul_ps(values, _mm512_set1_ps(absmax));
                _mm512_storeu_ps(scales + i, _mm512_add_ps(values, _mm512_set1_ps(weight.offset)));
            }
        } else {
            copy_scales(weight, first, whole, scales);
        }
        copy_scales(weight, first + whole, count - whole, scales + whole);
        _mm512_storeu_ps(scales + count, _mm512_setzero_ps());
        if (!zeros) return;
        for (int64_t i = 0; i < count; i++) zeros[i] = weight.zeros[first + i];
        _mm512_storeu_ps(zeros + count, _mm512_setzero_ps());
    }

    // Adds chunk `c` of a row to its sums. `base` is the value of code 0 of a linear table, for
    // which `offsets` gathers scale * (base - zero) * (the total of the inputs), or, without zeros,
    // scale * total, which store_rows multiplies by base.
    template <int TOKENS, bool LINEAR, class Codes>
    QMIX_INLINE static QMIX_VNNI void add_chunk(const uint8_t* source, const Codes& codes,
                                                const QuantizedInputs& in, int64_t c,
                                                int64_t chunks, const float* scales,
                                                const float* zeros, float base, __m512i index,
                                                __m512 (&sums)[TOKENS], __m128 (&offsets)[TOKENS]) {
        __m512i chunk_sums[TOKENS];
        codes.multiply(_mm512_loadu_si512(source), in.x + c * CHUNK, chunks * CHUNK, chunk_sums);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            __m128 scaled =
                _mm_mul_ps(_mm_loadu_ps(scales), _mm_set1_ps(in.scales[t * chunks + c]));
            const __m512 scale = _mm512_permutexvar_ps(index, _mm512_castps128_ps512(scaled));
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(chunk_sums[t]), scale, sums[t]);
            if (!LINEAR) continue;
            if (Codes::ZEROS)
                scaled = _mm_mul_ps(scaled, _mm_sub_ps(_mm_set1_ps(base), _mm_loadu_ps(zeros)));
            const __m128 totals = _mm_loadu_ps(in.totals + (t * chunks + c) * 4);
            offsets[t] = _mm_fmadd_ps(scaled, totals, offsets[t]);
        }
    }

    // Multiplies rows [first, end), ROWS at a time, by TOKENS tokens: more rows mean fewer loads of
    // inputs, more tokens fewer look-ups.
    template <int ROWS, int TOKENS, bool LINEAR, class Codes>
    static QMIX_VNNI void multiply_rows(const Matrix& weight, const Codes& shared, float base,
                                        int64_t unit, const QuantizedInputs in, int64_t first,
                                        int64_t end, const Scratch scratch, float* y) {
        const Codes multiplier = shared;  // a copy that can stay in registers
        const __m512i index = Avx512::scale_index(unit);
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK, units = CHUNK / unit;
        const int64_t bytes = weight.inputs / 2, row_units = weight.inputs / unit;
        const int64_t pitch = scratch.pitch;
        uint8_t last[ROWS][CHUNK_BYTES] = {};
        for (int64_t row = first; row < end; row += ROWS) {
            for (int r = 0; r < ROWS; r++) {
                prefetch_scales(weight, row + r + 8);
                read_row_scales(weight, unit, row + r, row_units, scratch.scales + r * pitch,
                                Codes::ZEROS ? scratch.zeros + r * pitch : nullptr);
            }
            __m512 sums[ROWS][TOKENS];
            __m128 offsets[ROWS][TOKENS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                for (int t = 0; t < TOKENS; t++)
                    sums[r][t] = _mm512_setzero_ps(), offsets[r][t] = _mm_setzero_ps();
            // First all whole chunks, then a copy of the codes of one that is not: reading on would
            // leave the matrix.
            const uint8_t* codes[ROWS];
            for (int r = 0; r < ROWS; r++) codes[r] = weight.codes + (row + r) * bytes;
            for (int64_t c = 0, stop = weight.inputs / CHUNK; c < chunks; stop = chunks) {
                if (c == weight.inputs / CHUNK)
                    for (int r = 0; r < ROWS; r++) {
                        memcpy(last[r], codes[r] + c * CHUNK_BYTES, weight.inputs % CHUNK / 2);
                        codes[r] = last[r] - c * CHUNK_BYTES;
                    }
                for (; c < stop; c++) {
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        const uint8_t* source = codes[r] + c * CHUNK_BYTES;
                        // To the second cache, as in prefetch_codes.
                        _mm_prefetch(reinterpret_cast<const char*>(source + ROWS * bytes),
                                     _MM_HINT_T1);
                        const int64_t at = r * pitch + c * units;
                        add_chunk<TOKENS, LINEAR>(source, multiplier, in, c, chunks,
                                                  scratch.scales + at, scratch.zeros + at, base,
                                                  index, sums[r], offsets[r]);
                    }
                }
            }
            store_rows<LINEAR && !Codes::ZEROS, LINEAR>(weight, row, base, sums, offsets, y);
        }
    }

    template <bool SHARED_BASE, bool LINEAR, int ROWS, int TOKENS>
    QMIX_INLINE static QMIX_VNNI void store_rows(const Matrix& weight, int64_t row, float base,
                                                 __m512 (&sums)[ROWS][TOKENS],
                                                 __m128 (&offsets)[ROWS][TOKENS], float* y) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TOKENS; t++) {
                if (SHARED_BASE) offsets[r][t] = _mm_mul_ps(offsets[r][t], _mm_set1_ps(base));
                if (LINEAR)
                    sums[r][t] = _mm512_add_ps(sums[r][t], _mm512_zextps128_ps512(offsets[r][t]));
                y[t * weight.rows + row + r] = _mm512_reduce_add_ps(sums[r][t]);
            }
    }

    template <int ROWS, bool LINEAR, class Codes>
    static void multiply_tokens(const Matrix& weight, const Codes& codes, float base, int64_t unit,
                                QuantizedInputs in, int64_t first, int64_t end,
                                const Scratch& scratch, float* y) {
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK;
        for (int64_t t = 0; t < in.tokens; t += 4, y += 4 * weight.rows) {
            switch (in.tokens - t) {
            case 1:
                multiply_rows<ROWS, 1, LINEAR>(weight, codes, base, unit, in, first, end, scratch,
                                               y);
                break;
            case 2:
                multiply_rows<ROWS, 2, LINEAR>(weight, codes, base, unit, in, first, end, scratch,
                                               y);
                break;
            case 3:
                multiply_rows<ROWS, 3, LINEAR>(weight, codes, base, unit, in, first, end, scratch,
                                               y);
                break;
            default:
                multiply_rows<ROWS, 4, LINEAR>(weight, codes, base, unit, in, first, end, scratch,
                                               y);
            }
            in.x += 4 * chunks * CHUNK, in.scales += 4 * chunks, in.totals += 16 * chunks;
        }
    }

    // y [tokens, rows]: rows [first, end), ROWS at a time, times all quantized tokens.
    template <int ROWS>
    static QMIX_VNNI void multiply_int16(const Matrix& weight, const IntegerTable& table,
                                         int64_t unit, const QuantizedInputs& in, int64_t first,
                                         int64_t end, const Scratch& scratch, float* y) {
        const float base = table.values[0];
        if (!table.linear)
            multiply_tokens<ROWS, false>(weight, TableCodes{_mm512_loadu_si512(table.values)}, base,
                                         unit, in, first, end, scratch, y);
        else if (weight.zeros)
            multiply_tokens<ROWS, true>(weight, LinearCodes<true>{}, base, unit, in, first, end,
                                        scratch, y);
        else
            multiply_tokens<ROWS, true>(weight, LinearCodes<false>{}, base, unit, in, first, end,
                                        scratch, y);
    }
};

}  // namespace
#endif
