// Reading the numbers that groups share, plain or nested: a run of them at a time, as float32.

#pragma once

#include "float_math.h"
#include "structs.h"

namespace {

bool is_nested(const GroupValues& array) { return array.kind >= NESTED8; }

inline float outer_at(const GroupValues& array, int64_t at) {
    if (array.outer_kind == FLOAT16)
        return half_to_float(static_cast<const uint16_t*>(array.outer)[at]);
    return static_cast<const float*>(array.outer)[at];
}

int64_t nested_code(const GroupValues& array, int64_t i) {
    const uint8_t* codes = static_cast<const uint8_t*>(array.values);
    if (array.kind == NESTED8) return codes[i];
    codes += i / 4 * 3;
    switch (i % 4) {
    case 0:
        return codes[0] & 63;
    case 1:
        return (codes[0] >> 6 | codes[1] << 2) & 63;
    case 2:
        return (codes[1] >> 4 | codes[2] << 4) & 63;
    default:
        return codes[2] >> 2;
    }
}

// Converts halves; the last few one by one.
inline void copy_halves(const uint16_t* bits, int64_t count, float* out) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
    }
#elif defined(__ARM_NEON)
    for (; i + 4 <= count; i += 4)
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits + i))));
#endif
    for (; i < count; i++) out[i] = half_to_float(bits[i]);
}

#if defined(__AVX2__)
// Eight codes of six bits. Without `more` codes behind them no byte there is read.
inline __m256i eight_of_six_bits(const uint8_t* codes, bool more) {
    uint64_t bits;
    if (more) {
        memcpy(&bits, codes, 8);
    } else {
        uint32_t four;  // bytes, and two: six at once would be a store and a slow load of it
        uint16_t two;
        memcpy(&four, codes, 4), memcpy(&two, codes + 4, 2);
        bits = four | uint64_t(two) << 32;
    }
    const __m256i threes = _mm256_setr_epi8(0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1,
                                            3, 4, 5, -1, 3, 4, 5, -1, 3, 4, 5, -1, 3, 4, 5, -1);
    const __m256i words = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(bits)), threes);
    const __m256i shifts = _mm256_setr_epi32(0, 6, 12, 18, 0, 6, 12, 18);
    return _mm256_and_si256(_mm256_srlv_epi32(words, shifts), _mm256_set1_epi32(63));
}

// Nested values, eight for each of `factors`.
template <bool SIX_BITS, bool LINE>
inline void copy_eights(const GroupValues& array, const uint8_t* codes, const float* factors,
                        int64_t eights, float* out) {
    const __m256 start = _mm256_set1_ps(array.start), step = _mm256_set1_ps(array.step);
    const __m256 offset = _mm256_set1_ps(array.offset);
    const float* map = array.map;
    for (int64_t i = 0; i < eights; i++, codes += SIX_BITS ? 6 : 8, out += 8) {
        const __m128i* bytes = reinterpret_cast<const __m128i*>(codes);
        const __m256i eight = SIX_BITS ? eight_of_six_bits(codes, i + 1 < eights)
                                       : _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes));
        const __m256 values =
            LINE ? _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(eight), step), start)
                 : _mm256_i32gather_ps(map, eight, 4);
        const __m256 scaled = _mm256_mul_ps(values, _mm256_broadcast_ss(factors + i));
        _mm256_storeu_ps(out, _mm256_add_ps(scaled, offset));
    }
}

// The outer values of `eights` runs of eight values, the first of which begins at value `first`.
inline void copy_factors(const GroupValues& array, int64_t first, int64_t eights, float* factors) {
    if (array.block == 8 && array.outer_kind == FLOAT16)
        return copy_halves(static_cast<const uint16_t*>(array.outer) + first / 8, eights, factors);
    const int64_t each = array.block / 8;
    int64_t outer = first / array.block, left = each - first / 8 % each;
    for (int64_t i = 0; i < eights; left = each, outer++) {
        const float factor = outer_at(array, outer);
        for (; left && i < eights; left--) factors[i++] = factor;
    }
}

// As many nested values from index `first` on as `count` has eights. Both `first` and the block are
// multiples of eight. Returns how many.
inline int64_t copy_nested_eights(const GroupValues& array, int64_t first, int64_t count,
                                  float* out) {
    constexpr int64_t EIGHTS = 64;  // at a time
    float factors[EIGHTS];
    int64_t done = 0;
    for (int64_t left = count / 8; left; ) {
        const int64_t eights = left < EIGHTS ? left : EIGHTS, at = first + done;
        copy_factors(array, at, eights, factors);
        const uint8_t* codes = static_cast<const uint8_t*>(array.values);
        const bool six = array.kind == NESTED6;
        const auto copy = six ? array.step ? copy_eights<true, true> : copy_eights<true, false>
                          : array.step ? copy_eights<false, true> : copy_eights<false, false>;
        copy(array, codes + (six ? at / 4 * 3 : at), factors, eights, out + done);
        left -= eights, done += 8 * eights;
    }
    return done;
}
#endif

// Nested values [first, first + count).
inline void copy_nested(const GroupValues& array, int64_t first, int64_t count, float* out) {
    int64_t i = 0;
#if defined(__AVX2__)
    if (first % 8 == 0 && array.block % 8 == 0) i = copy_nested_eights(array, first, count, out);
#endif
    int64_t at = first + i, stop = first + count;
    for (int64_t outer = at / array.block; at < stop; outer++) {
        const float factor = outer_at(array, outer);
        const int64_t end = (outer + 1) * array.block;
        for (; at < stop && at < end; at++)
            out[at - first] = array.map[nested_code(array, at)] * factor + array.offset;
    }
}

// Copies `count` numbers from index `first` on.
void copy_values(const GroupValues& array, int64_t first, int64_t count, float* out) {
    if (array.kind == FLOAT32) {
        memcpy(out, static_cast<const float*>(array.values) + first, sizeof(float) * count);
    } else if (array.kind == FLOAT16) {
        copy_halves(static_cast<const uint16_t*>(array.values) + first, count, out);
    } else if (array.kind == BFLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(array.values) + first;
        for (int64_t i = 0; i < count; i++) out[i] = bfloat16_to_float(bits[i]);
    } else if (array.kind == UINT8) {
        const uint8_t* bytes = static_cast<const uint8_t*>(array.values) + first;
        for (int64_t i = 0; i < count; i++) out[i] = bytes[i];
    } else {
        copy_nested(array, first, count, out);
    }
}

// Fetches `count` numbers that are needed soon into the first cache.
inline void prefetch_values(const GroupValues& array, int64_t first, int64_t count) {
    if (!array.values) return;
    const int64_t quarters = array.kind == FLOAT32                             ? 16
                             : array.kind == FLOAT16 || array.kind == BFLOAT16 ? 8
                             : array.kind == NESTED6                           ? 3
                                                                               : 4;
    const char* values = static_cast<const char*>(array.values) + first * quarters / 4;
    for (int64_t i = 0; i < count * quarters / 4; i += 64) __builtin_prefetch(values + i);
    if (is_nested(array) && array.block < count) {
        const int64_t bytes = array.outer_kind == FLOAT16 ? 2 : 4;
        const char* outers = static_cast<const char*>(array.outer) + first / array.block * bytes;
        for (int64_t i = 0; i < count / array.block * bytes; i += 64) __builtin_prefetch(outers + i);
    }
}

}  // namespace
