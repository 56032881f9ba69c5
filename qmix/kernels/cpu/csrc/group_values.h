// Reading the numbers that groups share, plain or nested: a run of them at a time, as float32.

#pragma once

#include "float_math.h"
#include "structs.h"

namespace {

bool is_nested(const GroupValues& array) { return array.kind >= NESTED8; }

float outer_at(const GroupValues& array, int64_t at) {
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

// Copies `count` numbers from index `first` on.
void copy_values(const GroupValues& array, int64_t first, int64_t count, float* out) {
    if (array.kind == FLOAT32) {
        memcpy(out, static_cast<const float*>(array.values) + first, sizeof(float) * count);
    } else if (array.kind == FLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(array.values) + first;
        for (int64_t i = 0; i < count; i++) out[i] = half_to_float(bits[i]);
    } else if (array.kind == BFLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(array.values) + first;
        for (int64_t i = 0; i < count; i++) out[i] = bfloat16_to_float(bits[i]);
    } else if (array.kind == UINT8) {
        const uint8_t* bytes = static_cast<const uint8_t*>(array.values) + first;
        for (int64_t i = 0; i < count; i++) out[i] = bytes[i];
    } else {
        for (int64_t i = first; i < first + count;) {
            const int64_t left = array.block - i % array.block, last = first + count;
            const int64_t end = i + left < last ? i + left : last;
            const float outer = outer_at(array, i / array.block);
            for (; i < end; i++)
                out[i - first] = array.map[nested_code(array, i)] * outer + array.offset;
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

#if defined(__x86_64__)

QMIX_AVX2 void copy_values_avx2(const GroupValues& array, int64_t first, int64_t count,
                                float* out) {
    if (array.kind != FLOAT16) return copy_values(array, first, count, out);
    const uint16_t* bits = static_cast<const uint16_t*>(array.values) + first;
    const int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
    }
    copy_values(array, first + whole, count - whole, out + whole);
}

// Sixteen codes of nested values from index `i` on, which is a multiple of four if they have six
// bits.
inline QMIX_AVX512 __m512i nested_codes(const GroupValues& array, int64_t i) {
    const uint8_t* codes = static_cast<const uint8_t*>(array.values);
    if (array.kind == NESTED8)
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m128i bytes = _mm_maskz_loadu_epi8(0xfff, codes + i / 4 * 3);
    const __m128i threes = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m512i fours =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 _mm512_castsi128_si512(_mm_shuffle_epi8(bytes, threes)));
    const __m512i shifts = _mm512_set4_epi32(18, 12, 6, 0);
    return _mm512_and_si512(_mm512_srlv_epi32(fours, shifts), _mm512_set1_epi32(63));
}

// Where a run of nested values stands among their outer ones.
struct OuterRun {
    int64_t at, left;  // the outer value, and how many more values have it

    OuterRun(const GroupValues& array, int64_t i)
        : at(i / array.block), left(array.block - i % array.block) {}

    // The outer values of the next sixteen.
    inline QMIX_AVX512 __m512 next(const GroupValues& array) {
        if (left >= 16) {
            const __m512 outer = _mm512_set1_ps(outer_at(array, at));
            left -= 16;
            if (!left) at++, left = array.block;
            return outer;
        }
        alignas(64) float outer[16];
        for (float& lane : outer) {
            lane = outer_at(array, at);
            if (!--left) at++, left = array.block;
        }
        return _mm512_load_ps(outer);
    }
};

QMIX_AVX512 void copy_values_avx512(const GroupValues& array, int64_t first, int64_t count,
                                    float* out) {
    const int64_t whole = array.kind == NESTED6 && first % 4 ? 0 : count / 16 * 16;
    if (array.kind == FLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(array.values) + first;
        for (int64_t i = 0; i < whole; i += 16) {
            const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + i));
            _mm512_storeu_ps(out + i, _mm512_cvtph_ps(halves));
        }
    } else if (array.kind == FLOAT32) {
        const float* source = static_cast<const float*>(array.values) + first;
        for (int64_t i = 0; i < whole; i += 16)
            _mm512_storeu_ps(out + i, _mm512_loadu_ps(source + i));
    } else if (array.kind == UINT8) {
        const uint8_t* bytes = static_cast<const uint8_t*>(array.values) + first;
        for (int64_t i = 0; i < whole; i += 16) {
            const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
            _mm512_storeu_ps(out + i, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(some)));
        }
    } else if (array.kind == BFLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(array.values) + first;
        for (int64_t i = 0; i < whole; i += 16) {
            const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + i));
            const __m512i words = _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
            _mm512_storeu_si512(out + i, words);
        }
    } else {
        OuterRun outer(array, first);
        for (int64_t i = 0; i < whole; i += 16) {
            const __m512i codes = nested_codes(array, first + i);
            __m512 values = _mm512_i32gather_ps(codes, array.map, 4);
            values = _mm512_mul_ps(values, outer.next(array));
            _mm512_storeu_ps(out + i, _mm512_add_ps(values, _mm512_set1_ps(array.offset)));
        }
    }
    if (whole < count) copy_values(array, first + whole, count - whole, out + whole);
}

#endif

}  // namespace
