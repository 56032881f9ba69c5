// Registers of 64 bytes, for processors with AVX-512, with or without the instructions that add up
// products of integers (VNNI). integer_rows.h calls what is here.

#pragma once

#include <type_traits>

#include "avx512.h"
#include "int16.h"

#if defined(__AVX512F__)
namespace {
namespace avx512 {

typedef Avx512 FloatKernels;

struct Width {
    static constexpr int BYTES = 64;
    // More tokens are multiplied faster in tiles: measured.
#if defined(__AVX512VNNI__)
    static constexpr int64_t max_tokens(int64_t bits) { return bits == 8 ? 8 : 16; }
#else
    static constexpr int64_t max_tokens(int64_t bits) { return bits == 8 ? 8 : 12; }
#endif
    static constexpr int TILE_ROWS_AT_ONCE = 12;
    static constexpr int64_t TABLE_UNIT = 16;
    static constexpr bool MAPS_SMALL_TABLES = false;
    typedef __m512i Register;
    typedef __m512i Ints;
    typedef __m512 Floats;
    typedef __m256 Units;

    static QMIX_INLINE Register load(const uint8_t* codes) { return _mm512_loadu_si512(codes); }
    static QMIX_INLINE Units load_units(const float* units) { return _mm256_loadu_ps(units); }
    static QMIX_INLINE Floats floats(Ints sums) { return _mm512_cvtepi32_ps(sums); }
    static QMIX_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static QMIX_INLINE Units fma(Units a, Units b, Units c) { return _mm256_fmadd_ps(a, b, c); }
    static QMIX_INLINE Ints load_ints(const int16_t* pairs) { return _mm512_loadu_si512(pairs); }
    static QMIX_INLINE Floats load_floats(const float* source) { return _mm512_loadu_ps(source); }
    static QMIX_INLINE void store_floats(Floats values, float* out) {
        _mm512_storeu_ps(out, values);
    }
    static QMIX_INLINE Ints broadcast(const int16_t* pair) {
        int32_t bits;
        memcpy(&bits, pair, 4);
        return _mm512_set1_epi32(bits);
    }
    static QMIX_INLINE Ints add_products(Ints sums, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
        return _mm512_dpwssd_epi32(sums, a, b);
#else
        return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
    }
    static QMIX_INLINE Floats add_units(Floats sums, Units units) {
        return _mm512_add_ps(sums, _mm512_zextps256_ps512(units));
    }
    static QMIX_INLINE float sum(Floats sums) { return _mm512_reduce_add_ps(sums); }

    struct Spread {
        __m512i index;
        explicit Spread(int64_t words) {
            const __m512i word =
                _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            index = _mm512_srl_epi32(word, _mm_cvtsi64_si128(__builtin_ctzll(words)));
        }
        QMIX_INLINE Floats operator()(Units units, int) const {
            return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(units));
        }
    };

    struct Nibbles {
        Register low, high;
    };
    static QMIX_INLINE Nibbles nibbles(Register codes) {
        const __m512i nibble = _mm512_set1_epi8(15);
        return {_mm512_and_si512(codes, nibble),
                _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble)};
    }
    static QMIX_INLINE Ints dot(const Nibbles& codes, const int16_t* x) {
        const __m512i high_low = _mm512_loadu_si512(x), high_high = _mm512_loadu_si512(x + 32);
        const __m512i low_low = _mm512_loadu_si512(x + 64), low_high = _mm512_loadu_si512(x + 96);
#if defined(__AVX512VNNI__)
        __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.low, high_low);
        sums = _mm512_slli_epi32(_mm512_dpbusd_epi32(sums, codes.high, high_high), 8);
        sums = _mm512_dpbusd_epi32(sums, codes.low, low_low);
        return _mm512_dpbusd_epi32(sums, codes.high, low_high);
#else
        const __m512i high = _mm512_add_epi16(_mm512_maddubs_epi16(codes.low, high_low),
                                              _mm512_maddubs_epi16(codes.high, high_high));
        const __m512i low = _mm512_add_epi16(_mm512_maddubs_epi16(codes.low, low_low),
                                             _mm512_maddubs_epi16(codes.high, low_high));
        return _mm512_add_epi32(_mm512_madd_epi16(high, _mm512_set1_epi16(256)),
                                _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
#endif
    }

    template <int BITS>
    static QMIX_INLINE Nibbles joined(const Nibbles& lower, const uint8_t* upper) {
        if (BITS == 6) {
            const __m512i bits = _mm512_cvtepu8_epi16(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper)));
            const __m512i both =
                _mm512_or_si512(_mm512_slli_epi16(bits, 4), _mm512_slli_epi16(bits, 8));
            const __m512i mask = _mm512_set1_epi8(0x30);
            return {_mm512_or_si512(lower.low, _mm512_and_si512(both, mask)),
                    _mm512_or_si512(lower.high,
                                    _mm512_and_si512(_mm512_srli_epi16(both, 2), mask))};
        }
        const __m512i words = _mm512_setr_epi32(
            0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707,
            0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e,
            0x0f0f0f0f);
        const __m512i bits = _mm512_shuffle_epi8(
            _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(upper))),
            words);
        const __m512i bit = _mm512_set1_epi8(16);
        const __mmask64 evens = _mm512_test_epi8_mask(bits, _mm512_set1_epi32(0x40100401));
        const __mmask64 odds = _mm512_test_epi8_mask(bits, _mm512_set1_epi32(int(0x80200802)));
        return {_mm512_mask_add_epi8(lower.low, evens, lower.low, bit),
                _mm512_mask_add_epi8(lower.high, odds, lower.high, bit)};
    }

    static QMIX_INLINE Nibbles mapped(const Nibbles& codes, Register map) {
        return {_mm512_shuffle_epi8(map, codes.low), _mm512_shuffle_epi8(map, codes.high)};
    }

    struct Table {
        __m512i values;  // the sixteen twice: the fifth bit of an index belongs to another code
        explicit Table(const IntegerTable& table) : values(_mm512_loadu_si512(table.values)) {}
    };
    struct Values {
        __m512i words[4];
    };
    static QMIX_INLINE Values lookup(Register codes, const Table& table) {
        return {{_mm512_permutexvar_epi16(codes, table.values),
                 _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table.values),
                 _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table.values),
                 _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table.values)}};
    }
    static QMIX_INLINE Ints dot(const Values& values, const int16_t* x) {
        __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            const __m512i inputs = _mm512_loadu_si512(x + 32 * p);
#if defined(__AVX512VNNI__)
            sums = _mm512_dpwssd_epi32(sums, values.words[p], inputs);
#else
            sums = _mm512_add_epi32(sums, _mm512_madd_epi16(values.words[p], inputs));
#endif
        }
        return sums;
    }

    // Codes of 8 bits: as they are, or as 16-bit integers.
#if defined(__AVX512VNNI__)
    struct Wide {
        __m512i codes;
    };
    static QMIX_INLINE Wide wide(Register codes) { return {codes}; }
    static QMIX_INLINE Ints dot(const Wide& wide, const int16_t* x) {
        const __m512i sums =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), wide.codes, _mm512_loadu_si512(x));
        return _mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), wide.codes,
                                   _mm512_loadu_si512(x + 32));
    }
    static void arrange_bytes(const int16_t* words, int16_t* out) {
        arrange_planes<BYTES>(words, out);
    }
#else
    struct Wide {
        __m512i words[2];
    };
    static QMIX_INLINE Wide wide(Register codes) {
        const __m512i zero = _mm512_setzero_si512();
        return {{_mm512_unpacklo_epi8(codes, zero), _mm512_unpackhi_epi8(codes, zero)}};
    }
    static QMIX_INLINE Ints dot(const Wide& codes, const int16_t* x) {
        return _mm512_add_epi32(
            _mm512_madd_epi16(codes.words[0], _mm512_loadu_si512(x)),
            _mm512_madd_epi16(codes.words[1], _mm512_loadu_si512(x + 32)));
    }
    static void arrange_bytes(const int16_t* words, int16_t* out) {
        arrange_unpacked<1, 4>(words, out);
    }
#endif

    // Every fourth input: a shifted register has one code of each word in its low bits.
    static void arrange_table(const int16_t* words, int32_t high_first, int16_t* out) {
        for (int p = 0; p < 4; p++, out += 32)
            for (int i = 0; i < 32; i++) out[i] = words[4 * i + (p ^ high_first)];
    }
};

#include "integer_tiles.h"
typedef TileKernels OtherKernels;
#include "integer_rows.h"

}  // namespace avx512
}  // namespace
#endif
