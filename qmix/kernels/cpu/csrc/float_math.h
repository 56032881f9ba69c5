// Arithmetic on floats in words that a compiler turns into vectors of any instruction set.

#pragma once

#include "isa.h"

namespace {

// Sixteen values: one register, or as many as a processor needs for them.
typedef float Floats __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// As many as fit one register: what GCC can compare and choose without taking it apart.
#if defined(__AVX512F__)
constexpr int REGISTER_FLOATS = 16;
#elif defined(__AVX2__)
constexpr int REGISTER_FLOATS = 8;
#else
constexpr int REGISTER_FLOATS = 4;
#endif
typedef float FloatRegister __attribute__((vector_size(4 * REGISTER_FLOATS)));
typedef int32_t IntRegister __attribute__((vector_size(4 * REGISTER_FLOATS)));

QMIX_INLINE Floats load16(const uint16_t* source) {
    Halves bits;
    memcpy(&bits, source, sizeof bits);
    return Floats(__builtin_convertvector(bits, Words) << 16);
}

// GCC makes twenty instructions of the conversion that processors do in one.
QMIX_INLINE Floats load16(const int8_t* source) {
#if defined(__AVX512F__)
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
#elif defined(__AVX2__)
    __m256 halves[2];
    for (int i = 0; i < 2; i++) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source + 8 * i));
        halves[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
    Floats values;
    memcpy(&values, halves, sizeof values);
    return values;
#else
    typedef int8_t Codes __attribute__((vector_size(16)));
    typedef int32_t Integers __attribute__((vector_size(64)));
    Codes codes;
    memcpy(&codes, source, sizeof codes);
    return __builtin_convertvector(__builtin_convertvector(codes, Integers), Floats);
#endif
}

QMIX_INLINE Floats load16(const float* source) {
    Floats values;
    memcpy(&values, source, sizeof values);
    return values;
}

QMIX_INLINE float sum16(const Floats& values) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eights[2];
    memcpy(eights, &values, sizeof eights);
    eights[0] += eights[1];
    Four fours[2];
    memcpy(fours, &eights[0], sizeof fours);
    fours[0] += fours[1];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

QMIX_INLINE float bfloat16_to_float(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

// Rounds to even; every NaN becomes the same one.
QMIX_INLINE uint16_t float_to_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    const uint32_t even = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    return uint16_t(value != value ? 0x7fc0 : even);
}

QMIX_INLINE float round_to_bfloat16(float value) {
    return bfloat16_to_float(float_to_bfloat16(value));
}

inline float half_to_float(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff, word;
    float value;
    if (rest >= 0x7c00) {
        word = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        word = sign | ((rest << 13) + (112u << 23));
    } else {
        value = float(rest) * 0x1p-24f;
        memcpy(&word, &value, 4);
        word |= sign;
    }
    memcpy(&value, &word, 4);
    return value;
#endif
}

// e^x to within 2 units in the last place: 2^n times a polynomial in the remainder (Cephes' expf).
// Anything below -87 gives e^-87. Written in registers: for AVX2 GCC makes a loop of scalars of it.
QMIX_INLINE FloatRegister exp_approx(FloatRegister x) {
    constexpr float ROUNDING = 0x1.8p23f;  // what is added to it is rounded to an integer
    x = x > -87.f ? x : FloatRegister{} - 87.f;
    x = x < 89.f ? x : FloatRegister{} + 89.f;  // the power is infinite there
    const FloatRegister n = (x * 1.44269504f + ROUNDING) - ROUNDING;
    const FloatRegister rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    FloatRegister sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1;
    return sum * FloatRegister((__builtin_convertvector(n, IntRegister) + 127) << 23);
}

QMIX_INLINE float exp_approx(float x) { return exp_approx(FloatRegister{} + x)[0]; }

// out = silu(gate) * up; out may be gate. One so low that its exponential is infinite gives zero.
inline void swiglu(const float* gate, const float* up, int64_t count, float* out) {
    const auto step = [&](int64_t i, size_t bytes) {
        FloatRegister gates{}, ups{};
        memcpy(&gates, gate + i, bytes);
        memcpy(&ups, up + i, bytes);
        gates = gates / (1 + exp_approx(-gates)) * ups;
        memcpy(out + i, &gates, bytes);
    };
    const int64_t whole = count - count % REGISTER_FLOATS;
    for (int64_t i = 0; i < whole; i += REGISTER_FLOATS) step(i, sizeof(FloatRegister));
    if (whole < count) step(whole, sizeof(float) * size_t(count - whole));
}

}  // namespace
