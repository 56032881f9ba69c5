// Registers of 32 bytes, for processors with AVX2, with or without the instructions that add up
// products of integers (AVX-VNNI). integer_rows.h calls what is here.

#pragma once

#include <type_traits>

#include "avx2.h"
#include "int16.h"

#if defined(__AVX2__)
namespace {
namespace avx2 {

typedef Avx2 FloatKernels;

struct Width {
    static constexpr int BYTES = 32;
    // More tokens are multiplied faster in tiles: measured.
    static constexpr int64_t max_tokens(int64_t bits) { return bits == 8 ? 5 : 12; }
    static constexpr int TILE_ROWS_AT_ONCE = 6;
    static constexpr int64_t TABLE_UNIT = 32;  // the smallest unit whose sums a table keeps apart
    static constexpr bool MAPS_SMALL_TABLES = true;  // to codes whose products fit bytes
    typedef __m256i Register;
    typedef __m256i Ints;
    typedef __m256 Floats;
    typedef __m256 Units;  // MAX_UNITS numbers

    static QMIX_INLINE Register load(const uint8_t* codes) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    }
    static QMIX_INLINE Units load_units(const float* units) {
        return _mm256_loadu_ps(units);
    }
    static QMIX_INLINE Floats floats(Ints sums) { return _mm256_cvtepi32_ps(sums); }
    static QMIX_INLINE Floats fma(Floats a, Floats b, Floats c) {
        return _mm256_fmadd_ps(a, b, c);
    }
    static QMIX_INLINE Ints load_ints(const int16_t* pairs) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    }
    static QMIX_INLINE Floats load_floats(const float* source) { return _mm256_loadu_ps(source); }
    static QMIX_INLINE void store_floats(Floats values, float* out) {
        _mm256_storeu_ps(out, values);
    }
    // Two 16-bit integers in every lane.
    static QMIX_INLINE Ints broadcast(const int16_t* pair) {
        int32_t bits;
        memcpy(&bits, pair, 4);
        return _mm256_set1_epi32(bits);
    }
    static QMIX_INLINE Ints add_products(Ints sums, Ints a, Ints b) {
#if defined(__AVXVNNI__)
        return _mm256_dpwssd_avx_epi32(sums, a, b);
#else
        return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
    }
    static QMIX_INLINE Floats add_units(Floats sums, Units units) { return sums + units; }
    static QMIX_INLINE float sum(Floats sums) {
        const __m128 halves =
            _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
        const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
        return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
    }

    // Which of the units of a chunk each lane of a register has; a lane is a word of codes.
    struct Spread {
        __m256i index[2];
        explicit Spread(int64_t words) {
            const __m128i shift = _mm_cvtsi64_si128(__builtin_ctzll(words));
            const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            index[0] = _mm256_srl_epi32(first, shift);
            index[1] = _mm256_srl_epi32(_mm256_add_epi32(first, _mm256_set1_epi32(8)), shift);
        }
        QMIX_INLINE Floats operator()(Units units, int r) const {
            return _mm256_permutevar8x32_ps(units, index[r]);
        }
    };

    // Codes of 4 bits as bytes: those in the low nibbles and those in the high ones.
    struct Nibbles {
        Register low, high;
    };
    static QMIX_INLINE Nibbles nibbles(Register codes) {
        const __m256i nibble = _mm256_set1_epi8(15);
        return {_mm256_and_si256(codes, nibble),
                _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)};
    }
    static QMIX_INLINE Ints dot(const Nibbles& codes, const int16_t* x) {
        const __m256i* planes = reinterpret_cast<const __m256i*>(x);
        const __m256i high_low = _mm256_loadu_si256(planes);
        const __m256i high_high = _mm256_loadu_si256(planes + 1);
        const __m256i low_low = _mm256_loadu_si256(planes + 2);
        const __m256i low_high = _mm256_loadu_si256(planes + 3);
#if defined(__AVXVNNI__)
        __m256i sums = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes.low, high_low);
        sums = _mm256_slli_epi32(_mm256_dpbusd_avx_epi32(sums, codes.high, high_high), 8);
        sums = _mm256_dpbusd_avx_epi32(sums, codes.low, low_low);
        return _mm256_dpbusd_avx_epi32(sums, codes.high, low_high);
#else
        // 16 bits hold a sum of four products: see MAX_CODE.
        const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(codes.low, high_low),
                                              _mm256_maddubs_epi16(codes.high, high_high));
        const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(codes.low, low_low),
                                             _mm256_maddubs_epi16(codes.high, low_high));
        return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)),
                                _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
#endif
    }

    // The upper bits of a register's codes put above the lower four.
    template <int BITS>
    static QMIX_INLINE Nibbles joined(const Nibbles& lower, const uint8_t* upper) {
        if (BITS == 6) {
            const __m256i bits = _mm256_cvtepu8_epi16(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper)));
            const __m256i both =  // bytes of two codes each, at bits 4 to 7
                _mm256_or_si256(_mm256_slli_epi16(bits, 4), _mm256_slli_epi16(bits, 8));
            const __m256i mask = _mm256_set1_epi8(0x30);
            return {_mm256_or_si256(lower.low, _mm256_and_si256(both, mask)),
                    _mm256_or_si256(lower.high,
                                    _mm256_and_si256(_mm256_srli_epi16(both, 2), mask))};
        }
        int64_t loaded;
        memcpy(&loaded, upper, 8);
        const __m256i bits = _mm256_shuffle_epi8(
            _mm256_set1_epi64x(loaded),
            _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5,
                             6, 6, 6, 6, 7, 7, 7, 7));
        const __m256i even = _mm256_set1_epi32(0x40100401), bit = _mm256_set1_epi8(16);
        const __m256i odd = _mm256_slli_epi16(even, 1);
        const __m256i evens = _mm256_cmpeq_epi8(_mm256_and_si256(bits, even), even);
        const __m256i odds = _mm256_cmpeq_epi8(_mm256_and_si256(bits, odd), odd);
        return {_mm256_or_si256(lower.low, _mm256_and_si256(evens, bit)),
                _mm256_or_si256(lower.high, _mm256_and_si256(odds, bit))};
    }

    static QMIX_INLINE Nibbles mapped(const Nibbles& codes, Register map) {
        return {_mm256_shuffle_epi8(map, codes.low), _mm256_shuffle_epi8(map, codes.high)};
    }

    // The 16 values of a table as low and as high bytes.
    struct Table {
        __m256i low, high;
        explicit Table(const IntegerTable& table) {
            uint8_t bytes[2][16];
            for (int i = 0; i < 16; i++) {
                bytes[0][i] = uint8_t(table.values[i]);
                bytes[1][i] = uint8_t(uint16_t(table.values[i]) >> 8);
            }
            low = _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[0])));
            high = _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[1])));
        }
    };
    // Values as 16-bit integers, in the order of arrange_table.
    struct Values {
        __m256i words[4];
    };
    static QMIX_INLINE Values lookup(Register codes, const Table& table) {
        const Nibbles both = nibbles(codes);
        const __m256i low = _mm256_shuffle_epi8(table.low, both.low);
        const __m256i low_high = _mm256_shuffle_epi8(table.high, both.low);
        const __m256i high = _mm256_shuffle_epi8(table.low, both.high);
        const __m256i high_high = _mm256_shuffle_epi8(table.high, both.high);
        return {{_mm256_unpacklo_epi8(low, low_high), _mm256_unpackhi_epi8(low, low_high),
                 _mm256_unpacklo_epi8(high, high_high), _mm256_unpackhi_epi8(high, high_high)}};
    }
    // Eight products a lane: the limits of IntegerTable keep their sum below 2^31.
    static QMIX_INLINE Ints dot(const Values& values, const int16_t* x) {
        const __m256i* inputs = reinterpret_cast<const __m256i*>(x);
        __m256i sums = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m256i some = _mm256_loadu_si256(inputs + i);
#if defined(__AVXVNNI__)
            sums = _mm256_dpwssd_avx_epi32(sums, values.words[i], some);
#else
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(values.words[i], some));
#endif
        }
        return sums;
    }

    // Codes of 8 bits: as they are, or as 16-bit integers.
#if defined(__AVXVNNI__)
    struct Wide {
        Register codes;
    };
    static QMIX_INLINE Wide wide(Register codes) { return {codes}; }
    static QMIX_INLINE Ints dot(const Wide& wide, const int16_t* x) {
        const __m256i* planes = reinterpret_cast<const __m256i*>(x);
        const __m256i sums = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), wide.codes,
                                                     _mm256_loadu_si256(planes));
        return _mm256_dpbusd_avx_epi32(_mm256_slli_epi32(sums, 8), wide.codes,
                                       _mm256_loadu_si256(planes + 1));
    }
    static void arrange_bytes(const int16_t* words, int16_t* out) {
        arrange_planes<BYTES>(words, out);
    }
#else
    struct Wide {
        __m256i words[2];
    };
    static QMIX_INLINE Wide wide(Register codes) {
        const __m256i zero = _mm256_setzero_si256();
        return {{_mm256_unpacklo_epi8(codes, zero), _mm256_unpackhi_epi8(codes, zero)}};
    }
    static QMIX_INLINE Ints dot(const Wide& codes, const int16_t* x) {
        const __m256i* inputs = reinterpret_cast<const __m256i*>(x);
        return _mm256_add_epi32(_mm256_madd_epi16(codes.words[0], _mm256_loadu_si256(inputs)),
                                _mm256_madd_epi16(codes.words[1], _mm256_loadu_si256(inputs + 1)));
    }
    static void arrange_bytes(const int16_t* words, int16_t* out) {
        arrange_unpacked<1, 2>(words, out);
    }
#endif

    static void arrange_table(const int16_t* words, int32_t high_first, int16_t* out) {
        arrange_unpacked<2, 2>(words, out, high_first);
    }
};

#include "integer_tiles.h"
typedef TileKernels OtherKernels;
#include "integer_rows.h"

}  // namespace avx2
}  // namespace
#endif
