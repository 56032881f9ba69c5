// AVX-512 with the instructions that multiply pairs of 16-bit integers, or fours of 8-bit ones, and
// add them up. Chunks here are 32 words of 4 codes of 4 bits; of a linear table, bytes of codes.

#pragma once

#include "avx512.h"
#include "int16.h"

#if defined(__x86_64__)
namespace {

struct Vnni : Avx512 {
    static constexpr bool INT16 = true;
    static constexpr int64_t MAX_INT16_TOKENS = INT64_MAX;
    static bool takes(const Matrix& weight, const IntegerTable& table, int64_t) {
        return shift_of(weight) == NONE || table.linear;
    }

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
    template <int BITS>
    static QMIX_VNNI float quantize_chunk(const float* x, int64_t count, int32_t high_first,
                                          const IntegerTable& table, int64_t unit, int16_t* out,
                                          float* totals) {
        constexpr int64_t CHUNK = 512 / BITS;
        constexpr int REGISTERS = CHUNK / 32;  // of 16-bit integers
        float padded[CHUNK] = {};
        if (count < CHUNK) x = static_cast<float*>(memcpy(padded, x, sizeof(float) * count));
        __m512 inputs[2 * REGISTERS], magnitudes = _mm512_setzero_ps();
        __mmask16 not_finite = 0;
        for (int i = 0; i < 2 * REGISTERS; i++) {
            inputs[i] = _mm512_loadu_ps(x + 16 * i);
            not_finite |= _mm512_fpclass_ps_mask(inputs[i], 0x99);
            magnitudes = _mm512_max_ps(magnitudes, _mm512_abs_ps(inputs[i]));
        }
        const float largest = _mm512_reduce_max_ps(magnitudes);
        const float factor = largest > 0 ? table.max_activation / largest : 0;
        if (table.linear) memset(totals, 0, sizeof(float) * MAX_UNITS);
        if (not_finite || factor > 3e38f) {
            memset(out, 0, sizeof(int16_t) * CHUNK);
            return not_finite ? __builtin_nanf("") : 0;
        }
        __m512i words[REGISTERS], raised[REGISTERS];
        for (int i = 0; i < REGISTERS; i++) {
            const __m512 first = _mm512_mul_ps(inputs[2 * i], _mm512_set1_ps(factor));
            const __m512 second = _mm512_mul_ps(inputs[2 * i + 1], _mm512_set1_ps(factor));
            words[i] = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(first))),
                _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(second)), 1);
            raised[i] = _mm512_add_epi16(words[i], _mm512_set1_epi16(128));
            if (!table.linear) continue;
            const __m512i pairs = _mm512_madd_epi16(words[i], _mm512_set1_epi16(1));
            totals[32 * i / unit] += float(_mm512_mask_reduce_add_epi32(0xff, pairs));
            totals[(32 * i + 16) / unit] += float(_mm512_mask_reduce_add_epi32(0xff00, pairs));
        }
        if (table.linear) {
            if constexpr (BITS == 8)
                store_planes(words, raised, out);
            else
                store_bytes(words, raised, high_first, out);
            return largest / table.max_activation;
        }
        if constexpr (BITS == 4) store_fourths(words, high_first, out);
        return largest / (table.max_activation * table.factor);
    }

    // 256 high + low, both signed bytes: all high ones, then all low ones.
    static inline QMIX_VNNI void store_planes(const __m512i (&words)[2], const __m512i (&raised)[2],
                                              int16_t* out) {
        for (int i = 0; i < 2; i++) {
            const __m256i high = _mm512_cvtepi16_epi8(_mm512_srli_epi16(raised[i], 8));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * i), high);
            const __m256i low = _mm512_cvtepi16_epi8(words[i]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 + 16 * i), low);
        }
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
    struct TableCodes : Format<4, NONE> {
        static constexpr bool LINEAR = false;
        __m512i table;
        explicit QMIX_VNNI TableCodes(const IntegerTable& integers)
            : table(_mm512_loadu_si512(integers.values)) {}
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
    template <class Base>
    struct LinearCodes : Base {
        static constexpr bool LINEAR = true;
        explicit LinearCodes(const IntegerTable&) {}
        template <int TOKENS>
        QMIX_INLINE QMIX_VNNI void multiply(__m512i words, const int16_t* x, int64_t pitch,
                                            __m512i (&sums)[TOKENS]) const {
            constexpr bool BYTES = Base::BITS == 8;
            const __m512i nibble = _mm512_set1_epi8(15);
            const __m512i first = BYTES ? words : _mm512_and_si512(words, nibble);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++, x += pitch) {
                sums[t] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(x));
                if (!BYTES)
                    sums[t] = _mm512_dpbusd_epi32(sums[t], second, _mm512_loadu_si512(x + 32));
                sums[t] = _mm512_slli_epi32(sums[t], 8);
                const int16_t* low = x + Base::CHUNK / 2;
                sums[t] = _mm512_dpbusd_epi32(sums[t], first, _mm512_loadu_si512(low));
                if (!BYTES)
                    sums[t] = _mm512_dpbusd_epi32(sums[t], second, _mm512_loadu_si512(low + 32));
            }
        }
    };

    // Adds chunk `c` of a row to its sums. `base` is the value of code 0 of a linear table, for
    // which `offsets` gathers scale * (base - zero) * (the total of the inputs), or bias * total,
    // or, without either, scale * total, which store_rows multiplies by base.
    template <int TOKENS, class Codes>
    QMIX_INLINE static QMIX_VNNI void add_chunk(const uint8_t* source, const Codes& codes,
                                                const QuantizedInputs& in, int64_t c,
                                                int64_t chunks, const float* scales,
                                                const float* shifts, float base, __m512i index,
                                                __m512 (&sums)[TOKENS], __m256 (&offsets)[TOKENS]) {
        __m512i chunk_sums[TOKENS];
        codes.multiply(_mm512_loadu_si512(source), in.x + c * Codes::CHUNK, chunks * Codes::CHUNK,
                       chunk_sums);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            const __m256 input_scale = _mm256_set1_ps(in.scales[t * chunks + c]);
            __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(scales), input_scale);
            const __m512 scale = _mm512_permutexvar_ps(index, _mm512_castps256_ps512(scaled));
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(chunk_sums[t]), scale, sums[t]);
            if (!Codes::LINEAR) continue;
            if (Codes::SHIFT == ZEROS)
                scaled = _mm256_mul_ps(
                    scaled, _mm256_sub_ps(_mm256_set1_ps(base), _mm256_loadu_ps(shifts)));
            if (Codes::SHIFT == BIASES)
                scaled = _mm256_mul_ps(_mm256_loadu_ps(shifts), input_scale);
            const __m256 totals = _mm256_loadu_ps(in.totals + (t * chunks + c) * MAX_UNITS);
            offsets[t] = _mm256_fmadd_ps(scaled, totals, offsets[t]);
        }
    }

    // Multiplies rows [first, end), ROWS at a time, by TOKENS tokens: more rows mean fewer loads of
    // inputs, more tokens fewer look-ups.
    template <int ROWS, int TOKENS, class Codes>
    static QMIX_VNNI void multiply_rows(const Matrix& weight, const Codes& shared, float base,
                                        int64_t unit, const QuantizedInputs in, int64_t first,
                                        int64_t end, const Scratch scratch, float* y) {
        const Codes multiplier = shared;  // a copy that can stay in registers
        constexpr int64_t CHUNK = Codes::CHUNK;
        const __m512i index = Avx512::scale_index<Codes::WORD>(unit);
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK, units = CHUNK / unit;
        const int64_t bytes = weight.inputs * Codes::BITS / 8, row_units = weight.inputs / unit;
        const int64_t pitch = scratch.pitch;
        uint8_t last[ROWS][CHUNK_BYTES] = {};
        for (int64_t row = first; row < end; row += ROWS) {
            for (int r = 0; r < ROWS; r++) {
                prefetch_scales(weight, row + r + 8);
                read_scales<Vnni>(weight, unit, row + r, 0, row_units, scratch.scales + r * pitch,
                                  Codes::SHIFT == NONE ? nullptr : scratch.shifts + r * pitch);
            }
            __m512 sums[ROWS][TOKENS];
            __m256 offsets[ROWS][TOKENS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                for (int t = 0; t < TOKENS; t++)
                    sums[r][t] = _mm512_setzero_ps(), offsets[r][t] = _mm256_setzero_ps();
            // First all whole chunks, then a copy of the codes of one that is not: reading on would
            // leave the matrix.
            const uint8_t* codes[ROWS];
            for (int r = 0; r < ROWS; r++)
                codes[r] = codes_of(weight, row + r, 0, weight.inputs, scratch, r);
            for (int64_t c = 0, stop = weight.inputs / CHUNK; c < chunks; stop = chunks) {
                if (c == weight.inputs / CHUNK)
                    for (int r = 0; r < ROWS; r++) {
                        memcpy(last[r], codes[r] + c * CHUNK_BYTES,
                               weight.inputs % CHUNK * Codes::BITS / 8);
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
                        add_chunk<TOKENS>(source, multiplier, in, c, chunks, scratch.scales + at,
                                          scratch.shifts + at, base, index, sums[r], offsets[r]);
                    }
                }
            }
            store_rows<Codes::LINEAR && Codes::SHIFT == NONE, Codes::LINEAR>(weight, row, base,
                                                                             sums, offsets, y);
        }
    }

    template <bool SHARED_BASE, bool LINEAR, int ROWS, int TOKENS>
    QMIX_INLINE static QMIX_VNNI void store_rows(const Matrix& weight, int64_t row, float base,
                                                 __m512 (&sums)[ROWS][TOKENS],
                                                 __m256 (&offsets)[ROWS][TOKENS], float* y) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TOKENS; t++) {
                if (SHARED_BASE) offsets[r][t] = _mm256_mul_ps(offsets[r][t], _mm256_set1_ps(base));
                if (LINEAR)
                    sums[r][t] = _mm512_add_ps(sums[r][t], _mm512_zextps256_ps512(offsets[r][t]));
                y[t * weight.rows + row + r] = _mm512_reduce_add_ps(sums[r][t]);
            }
    }

    // All tokens, four at a time where several rows share an input's load.
    template <int ROWS, class Codes>
    static void multiply_tokens(const Matrix& weight, const Codes& codes, float base, int64_t unit,
                                QuantizedInputs in, int64_t first, int64_t end,
                                const Scratch& scratch, float* y) {
        const auto multiply = [&](auto kernel) {
            kernel(weight, codes, base, unit, in, first, end, scratch, y);
        };
        const int64_t chunks = round_up(weight.inputs, Codes::CHUNK) / Codes::CHUNK;
        constexpr int64_t STEP = ROWS == 2 ? 4 : 1;
        for (int64_t t = 0; t < in.tokens; t += STEP, y += STEP * weight.rows) {
            const int64_t left = in.tokens - t;
            if (STEP == 1 || left == 1)
                multiply(multiply_rows<ROWS, 1, Codes>);
            else if constexpr (STEP == 4) {
                if (left == 2)
                    multiply(multiply_rows<ROWS, 2, Codes>);
                else if (left == 3)
                    multiply(multiply_rows<ROWS, 3, Codes>);
                else
                    multiply(multiply_rows<ROWS, 4, Codes>);
            }
            in.x += STEP * chunks * Codes::CHUNK, in.scales += STEP * chunks;
            in.totals += STEP * chunks * MAX_UNITS;
        }
    }

    // y [tokens, rows]: rows [first, end), ROWS at a time, times all quantized tokens.
    template <int ROWS>
    static QMIX_VNNI void multiply_int16(const Matrix& weight, const IntegerTable& table,
                                         int64_t unit, const QuantizedInputs& in, int64_t first,
                                         int64_t end, const Scratch& scratch, float* y) {
        if (!table.linear)
            return multiply_tokens<ROWS>(weight, TableCodes(table), 0, unit, in, first, end,
                                         scratch, y);
        with_format(weight, [&](auto format) {
            multiply_tokens<ROWS>(weight, LinearCodes<decltype(format)>(table), table.values[0],
                                  unit, in, first, end, scratch, y);
        });
    }
};

}  // namespace
#endif
