// Attention of one token to the positions that it sees: softmax(q K^T / sqrt(width)) V, in float32.
//
// A group of heads shares keys and values. Positions are taken in pieces, each with a maximum and a sum of
// its own, and the pieces are joined in their order: the number of threads changes no bit.

#pragma once

#include <memory>
#include <vector>

#include "dense.h"
#include "threads.h"

extern "C" {

struct Attended {               // all bfloat16
    const uint16_t* q;          // [heads, width]
    const uint16_t *keys, *values;  // [groups][positions][width], each group's `pitch` elements apart
    uint16_t* out;              // [heads, width]
    int64_t heads, groups, width, positions, pitch;
};

}  // extern "C"

namespace {

constexpr int64_t PIECE = 128;  // positions: 32 KiB of keys at a width of 128
constexpr int TOGETHER = 4;     // heads of a group that read keys and values at once

// Sixteen values: one register, or as many as a processor needs for them.
typedef float Floats __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline __attribute__((always_inline)) Floats sixteen(const uint16_t* from) {
    Halves bits;
    memcpy(&bits, from, sizeof bits);
    return Floats(__builtin_convertvector(bits, Words) << 16);
}

inline __attribute__((always_inline)) Floats sixteen(const float* from) {
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

inline __attribute__((always_inline)) float total(const Floats& values) {
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

// Columns [at, at + 16 * COLUMNS) of so many heads' weighted sums of values.
template <int HEADS, int COLUMNS>
inline __attribute__((always_inline)) void weigh(const Attended& a, const uint16_t* values, int64_t held, int64_t at,
                                                 const float (*weights)[PIECE], float* to) {
    Floats sums[HEADS][COLUMNS] = {};
    for (int64_t p = 0; p < held; p++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            const Floats value = sixteen(values + p * a.width + at + 16 * c);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sums[h][c] += weights[h][p] * value;
        }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) memcpy(to + h * a.width + at + 16 * c, &sums[h][c], sizeof(Floats));
}

// A piece of the positions for some heads of a group: each one's maximum and sum, then its values' sum [width].
template <int HEADS>
inline __attribute__((always_inline)) void attend_values(const Attended& a, int64_t group, int64_t piece, const float* q,
                                                         float* bounds, float* to) {
    const int64_t first = piece * PIECE, width = a.width;
    const int64_t held = a.positions - first < PIECE ? a.positions - first : PIECE;
    const uint16_t* keys = a.keys + group * a.pitch + first * width;
    const uint16_t* values = a.values + group * a.pitch + first * width;
    float weights[HEADS][PIECE];
    for (int64_t p = 0; p < held; p++) {
        const uint16_t* key = keys + p * width;
        Floats sums[HEADS] = {};
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) {
            const Floats inputs = sixteen(key + i);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sums[h] += inputs * sixteen(q + h * width + i);
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            weights[h][p] = total(sums[h]);
            for (int64_t k = i; k < width; k++) weights[h][p] += q[h * width + k] * widened(key[k]);
        }
    }
    for (int h = 0; h < HEADS; h++) {
        for (int64_t p = held; p < up(held, 16); p++) weights[h][p] = -__builtin_inff();
        Floats largest = sixteen(weights[h]), sums = {};
        for (int64_t p = 16; p < held; p += 16) {
            const Floats some = sixteen(weights[h] + p);
            largest = some > largest ? some : largest;
        }
        float most = largest[0];
        for (int i = 1; i < 16; i++) most = largest[i] > most ? largest[i] : most;
        for (int64_t p = 0; p < up(held, 16); p++) {
            const float below = weights[h][p] - most;
            weights[h][p] = below == below ? exponential(below) : below;  // what is no number stays none
        }
        for (int64_t p = 0; p < held; p += 16) sums += sixteen(weights[h] + p);
        bounds[2 * h] = most;
        bounds[2 * h + 1] = total(sums);
    }
    int64_t at = 0;
    for (; at + 64 <= width; at += 64) weigh<HEADS, 4>(a, values, held, at, weights, to);
    for (; at + 16 <= width; at += 16) weigh<HEADS, 1>(a, values, held, at, weights, to);
    for (; at < width; at++)
        for (int h = 0; h < HEADS; h++) {
            to[h * width + at] = 0;
            for (int64_t p = 0; p < held; p++) to[h * width + at] += weights[h][p] * widened(values[p * width + at]);
        }
}

// All heads of a group.
inline __attribute__((always_inline)) void attend_group(const Attended& a, int64_t group, int64_t piece, const float* q,
                                                        float* bounds, float* to) {
    int64_t head = 0;
    for (; head + TOGETHER <= a.heads / a.groups; head += TOGETHER)
        attend_values<TOGETHER>(a, group, piece, q + head * a.width, bounds + 2 * head, to + head * a.width);
    for (; head < a.heads / a.groups; head++)
        attend_values<1>(a, group, piece, q + head * a.width, bounds + 2 * head, to + head * a.width);
}

#if defined(__x86_64__)
QMIX_AVX2 void attend_avx2(const Attended& a, int64_t group, int64_t piece, const float* q, float* bounds, float* to) {
    attend_group(a, group, piece, q, bounds, to);
}

QMIX_AVX512 void attend_avx512(const Attended& a, int64_t group, int64_t piece, const float* q, float* bounds, float* to) {
    attend_group(a, group, piece, q, bounds, to);
}
#endif

void attend_piece(const Attended& a, int64_t group, int64_t piece, const float* q, int32_t isa, float* bounds, float* to) {
#if defined(__x86_64__)
    if (isa >= AVX512) return attend_avx512(a, group, piece, q, bounds, to);
    if (isa == AVX2) return attend_avx2(a, group, piece, q, bounds, to);
#endif
    (void)isa;
    attend_group(a, group, piece, q, bounds, to);
}

void attend(const Attended& a, int threads, int32_t isa, Fork fork) {
    const int64_t pieces = up(a.positions, PIECE) / PIECE, shared = a.heads / a.groups, values = a.heads * a.width;
    const float by = 1 / __builtin_sqrtf(float(a.width));
    std::vector<float> q(static_cast<size_t>(values));
    const std::unique_ptr<float[]> memory(new float[size_t(pieces * (values + 2 * a.heads))]);
    float *bounds = memory.get(), *parts = bounds + pieces * 2 * a.heads;  // [pieces][heads][2 or width]
    for (int64_t i = 0; i < values; i++) q[i] = widened(a.q[i]) * by;
    if (values * a.positions < SERIAL / 8) threads = 1;
    each(a.groups * pieces, threads, fork, [&](int64_t item, int) {
        const int64_t group = item / pieces, piece = item % pieces, head = piece * a.heads + group * shared;
        attend_piece(a, group, piece, q.data() + group * shared * a.width, isa, bounds + 2 * head, parts + head * a.width);
    });
    each(a.heads, pieces > 8 ? threads : 1, fork, [&](int64_t head, int) {
        float *sums = q.data() + head * a.width, most = -__builtin_inff(), sum = 0;
        for (int64_t p = 0; p < pieces; p++) {
            const float here = bounds[2 * (p * a.heads + head)];
            most = here > most ? here : most;
        }
        for (int64_t i = 0; i < a.width; i++) sums[i] = 0;
        for (int64_t p = 0; p < pieces; p++) {
            const float* bound = bounds + 2 * (p * a.heads + head);
            const float share = pieces > 1 ? exponential(bound[0] - most) : 1;
            const float* part = parts + (p * a.heads + head) * a.width;
            sum += share * bound[1];
            for (int64_t i = 0; i < a.width; i++) sums[i] += share * part[i];
        }
        for (int64_t i = 0; i < a.width; i++) a.out[head * a.width + i] = rounded_to_even(sums[i] / sum);
    });
}

}  // namespace
