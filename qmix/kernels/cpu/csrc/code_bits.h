// Codes of 2 and 3 bits spread to 4, those of 5 and 6 to 8.

#pragma once

#include "isa.h"

namespace {

#if defined(__AVX2__)
// Words with the bits in `low` where they are, and the others `shift` higher.
inline __m256i parted(__m256i words, uint32_t low, int shift) {
    const __m256i mask = _mm256_set1_epi32(int32_t(low));
    const __m256i raised = _mm256_slli_epi32(_mm256_andnot_si256(mask, words), shift);
    return _mm256_or_si256(_mm256_and_si256(words, mask), raised);
}

// Spreads 64 codes of 2 or 3 bits to 4, eight a word.
inline __m256i spread_64(const uint8_t* codes, int64_t bits) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    if (bits == 2) {
        const __m256i pairs =
            _mm256_setr_epi8(0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1,
                             10, 11, -1, -1, 12, 13, -1, -1, 14, 15, -1, -1);
        const __m256i words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(first), pairs);
        return parted(parted(parted(words, 0x00ff, 8), 0x000f000f, 4), 0x03030303, 2);
    }
    const __m128i last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8));
    const __m256i threes =
        _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 4, 5, 6, -1, 7, 8, 9,
                         -1, 10, 11, 12, -1, 13, 14, 15, -1);
    const __m256i words = _mm256_shuffle_epi8(_mm256_set_m128i(last, first), threes);
    return parted(parted(parted(words, 0x0fff, 4), 0x003f003f, 2), 0x07070707, 1);
}
#endif

#if defined(__AVX2__)
// The upper bits of 32 codes, each where its byte has bit 4.
inline __m256i upper_of_32(const uint8_t* upper, int64_t bits) {
    if (bits == 1) {
        int32_t loaded;
        memcpy(&loaded, upper, 4);
        const __m256i spread = _mm256_shuffle_epi8(
            _mm256_set1_epi32(loaded),
            _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3,
                             3, 3, 3, 3, 3, 3, 3));
        const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
        return _mm256_and_si256(set, _mm256_set1_epi8(16));
    }
    int64_t loaded;
    memcpy(&loaded, upper, 8);
    // Each byte in two words, of two codes each: the first is shifted by 4 bits, the second is not.
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi64x(loaded),
        _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1, 4, -1, 4, -1, 5, -1,
                         5, -1, 6, -1, 6, -1, 7, -1, 7, -1));
    const __m256i first = _mm256_mullo_epi16(spread, _mm256_set1_epi32(16 | 1 << 16));
    return _mm256_or_si256(_mm256_and_si256(first, _mm256_set1_epi16(0x0030)),
                           _mm256_and_si256(_mm256_slli_epi16(first, 6),
                                            _mm256_set1_epi16(0x3000)));
}
#endif

// Spreads codes of 2 or 3 bits to 4, eight at a time.
void spread_codes(const uint8_t* codes, int64_t bits, int64_t count, uint8_t* out) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 64 <= count; i += 64, codes += 8 * bits, out += 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), spread_64(codes, bits));
#endif
    for (; i < count; i += 8, codes += bits, out += 4) {
        uint32_t word = codes[0] | uint32_t(codes[1]) << 8;
        if (bits == 2) {
            word = (word | word << 8) & 0x00ff00ff;
            word = (word | word << 4) & 0x0f0f0f0f;
            word = (word | word << 2) & 0x33333333;
        } else {
            word |= uint32_t(codes[2]) << 16;
            word = (word & 0x000fff) | (word & 0xfff000) << 4;
            word = (word & 0x003f003f) | (word & 0x0fc00fc0) << 2;
            word = (word & 0x07070707) | (word & 0x38383838) << 1;
        }
        memcpy(out, &word, 4);
    }
}

// Joins the lower and the upper bits of codes, a byte each; eight at a time.
void join_planes(const uint8_t* lower, const uint8_t* upper, int64_t upper_bits, int64_t count,
                 uint8_t* out) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 32 <= count; i += 32, lower += 16, upper += 4 * upper_bits, out += 32) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lower));
        const __m128i nibble = _mm_set1_epi8(15), odd = _mm_and_si128(_mm_srli_epi16(low, 4), nibble);
        const __m128i even = _mm_and_si128(low, nibble);
        const __m256i nibbles =
            _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
        const __m256i bits = upper_of_32(upper, upper_bits);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(nibbles, bits));
    }
#endif
    const uint32_t mask = (1u << upper_bits) - 1;
    for (; i < count; i += 8, lower += 4, upper += upper_bits, out += 8) {
        const uint32_t bits = upper[0] | (upper_bits == 2 ? upper[1] << 8 : 0);
        for (int k = 0; k < 8; k++)
            out[k] = uint8_t((lower[k / 2] >> 4 * (k % 2) & 15) |
                             (bits >> upper_bits * k & mask) << 4);
    }
}

}  // namespace
