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
// Eight codes of nested values from index `i` on, which is a multiple of eight.
inline __m256i eight_codes(const GroupValues& array, int64_t i) {
    const uint8_t* codes = static_cast<const uint8_t*>(array.values);
    uint64_t bits = 0;
    if (array.kind == NESTED8) {
        memcpy(&bits, codes + i, 8);
        return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bits)));
    }
    uint32_t four;  // bytes, and two: six at once would be a store and a slow load of it
    uint16_t two;
    memcpy(&four, codes + i / 4 * 3, 4), memcpy(&two, codes + i / 4 * 3 + 4, 2);
    bits = four | uint64_t(two) << 32;
    const __m256i threes = _mm256_setr_epi8(0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1,
                                            3, 4, 5, -1, 3, 4, 5, -1, 3, 4, 5, -1, 3, 4, 5, -1);
    const __m256i words = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(bits)), threes);
    const __m256i shifts = _mm256_setr_epi32(0, 6, 12, 18, 0, 6, 12, 18);
    return _mm256_and_si256(_mm256_srlv_epi32(words, shifts), _mm256_set1_epi32(63));
}
#endif

// Nested values [first, first + count), which share an outer value.
inline void copy_nested(const GroupValues& array, int64_t first, int64_t count, float outer,
                        float* out) {
    int64_t i = 0;
#if defined(__AVX2__)
    if (first % 8 == 0)
        for (; i + 8 <= count; i += 8) {
            const __m256i codes = eight_codes(array, first + i);
            __m256 values = array.step ? _mm256_mul_ps(_mm256_cvtepi32_ps(codes),
                                                       _mm256_set1_ps(array.step))
                                       : _mm256_i32gather_ps(array.map, codes, 4);
            values = _mm256_mul_ps(values, _mm256_set1_ps(outer));
            _mm256_storeu_ps(out + i, _mm256_add_ps(values, _mm256_set1_ps(array.offset)));
        }
#endif
    for (; i < count; i++)
        out[i] = array.map[nested_code(array, first + i)] * outer + array.offset;
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
        int64_t outer = first / array.block, left = array.block - first % array.block;
        for (int64_t i = 0; i < count; i += left, left = array.block, outer++) {
            if (left > count - i) left = count - i;
            copy_nested(array, first + i, left, outer_at(array, outer), out + i);
        }
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
}

}  // namespace
