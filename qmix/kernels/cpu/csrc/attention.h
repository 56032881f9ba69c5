// Attention of one token to the positions that it sees: softmax(q K^T / sqrt(width)) V, in float32.
//
// Keys and values are shared by a group of heads. Positions are taken in pieces, each with a
// maximum and a sum of its own, and the pieces are merged in order: the number of threads changes
// no bit.

#pragma once

#include <memory>
#include <vector>

#include "float_math.h"
#include "kv_rows.h"
#include "matrix.h"
#include "structs.h"
#include "threads.h"

namespace {

constexpr int64_t PIECE = 128;        // positions: 32 KiB of keys at a width of 128
constexpr int64_t HEADS_AT_ONCE = 4;  // heads of a group that read keys and values together

// Columns [column, column + 16 * VECTORS) of the weighted sums of `count` values, for HEADS heads.
template <class Rows, int HEADS, int VECTORS>
QMIX_INLINE void weighted_values(const TokenAttention& attention,
                                 const typename Rows::Element* values, int64_t count,
                                 int64_t column, const float (*weights)[PIECE], float* out) {
    const int64_t width = attention.width, size = Rows::size(width);
    Floats sums[HEADS][VECTORS] = {};
    for (int64_t p = 0; p < count; p++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const Floats value = load16(values + p * size + column + 16 * v);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sums[h][v] += weights[h][p] * value;
        }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            memcpy(out + h * width + column + 16 * v, &sums[h][v], sizeof(Floats));
}

// scores [HEADS][count]: q K^T.
template <class Rows, int HEADS>
QMIX_INLINE void score_keys(const typename Rows::Element* keys, int64_t count, int64_t width,
                            const float* q, float (*scores)[PIECE]) {
    for (int64_t p = 0; p < count; p++) {
        const typename Rows::Element* key = keys + p * Rows::size(width);
        Floats sums[HEADS] = {};
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) {
            const Floats inputs = load16(key + i);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sums[h] += inputs * load16(q + h * width + i);
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            scores[h][p] = sum16(sums[h]);
            for (int64_t k = i; k < width; k++)
                scores[h][p] += q[h * width + k] * Rows::value(key[k]);
            if (Rows::HAS_STEPS) scores[h][p] *= Rows::step(key, width);
        }
    }
}

// Turns the scores of one head into exponentials below their maximum: stats = maximum, sum.
QMIX_INLINE void exponentiate(float* scores, int64_t count, float* stats) {
    for (int64_t p = count; p < round_up(count, 16); p++) scores[p] = -__builtin_inff();
    Floats largest = load16(scores), sums = {};
    for (int64_t p = 16; p < count; p += 16) {
        const Floats some = load16(scores + p);
        largest = some > largest ? some : largest;
    }
    float highest = largest[0];
    for (int i = 1; i < 16; i++) highest = largest[i] > highest ? largest[i] : highest;
    for (int64_t p = 0; p < round_up(count, 16); p += REGISTER_FLOATS) {
        FloatRegister below;
        memcpy(&below, scores + p, sizeof below);
        below -= highest;
        below = below == below ? exp_approx(below) : below;  // NaN stays NaN
        memcpy(scores + p, &below, sizeof below);
    }
    for (int64_t p = 0; p < count; p += 16) sums += load16(scores + p);
    stats[0] = highest;
    stats[1] = sum16(sums);
}

// One piece of the positions for HEADS heads of a group: stats [HEADS][2], and out [HEADS][width],
// the sum of values weighted by exponentials.
template <class Rows, int HEADS>
QMIX_INLINE void attend_heads(const TokenAttention& attention, int64_t group, int64_t piece,
                              const float* q, float* stats, float* out) {
    const int64_t first = piece * PIECE, width = attention.width;
    const int64_t left = attention.positions - first, count = left < PIECE ? left : PIECE;
    typedef const typename Rows::Element* Place;
    const int64_t size = Rows::size(width), start = group * attention.pitch + first * size;
    const Place keys = Place(attention.keys) + start, values = Place(attention.values) + start;
    float weights[HEADS][PIECE];
    score_keys<Rows, HEADS>(keys, count, width, q, weights);
    for (int h = 0; h < HEADS; h++) exponentiate(weights[h], count, stats + 2 * h);
    if (Rows::HAS_STEPS)
        for (int64_t p = 0; p < count; p++) {
            const float step = Rows::step(values + p * size, width);
            for (int h = 0; h < HEADS; h++) weights[h][p] *= step;
        }
    int64_t column = 0;
    for (; column + 64 <= width; column += 64)
        weighted_values<Rows, HEADS, 4>(attention, values, count, column, weights, out);
    for (; column + 16 <= width; column += 16)
        weighted_values<Rows, HEADS, 1>(attention, values, count, column, weights, out);
    for (; column < width; column++)
        for (int h = 0; h < HEADS; h++) {
            out[h * width + column] = 0;
            for (int64_t p = 0; p < count; p++)
                out[h * width + column] +=
                    weights[h][p] * Rows::value(values[p * size + column]);
        }
}

// All heads of a group.
template <class Rows>
QMIX_INLINE void attend_group(const TokenAttention& attention, int64_t group, int64_t piece,
                              const float* q, float* stats, float* out) {
    const int64_t heads = attention.heads / attention.groups, width = attention.width;
    int64_t head = 0;
    for (; head + HEADS_AT_ONCE <= heads; head += HEADS_AT_ONCE)
        attend_heads<Rows, HEADS_AT_ONCE>(attention, group, piece, q + head * width, stats + 2 * head,
                                    out + head * width);
    for (; head < heads; head++)
        attend_heads<Rows, 1>(attention, group, piece, q + head * width, stats + 2 * head,
                        out + head * width);
}

// Merges the pieces of a head into `sums` [width]; stats are [pieces][heads][2] and sums of pieces
// [pieces][heads][width].
void merge_pieces(const TokenAttention& attention, int64_t pieces, int64_t head, const float* stats,
                  const float* piece_sums, float* sums) {
    const int64_t heads = attention.heads, width = attention.width;
    float highest = -__builtin_inff(), sum = 0;
    for (int64_t p = 0; p < pieces; p++) {
        const float piece_highest = stats[2 * (p * heads + head)];
        highest = piece_highest > highest ? piece_highest : highest;
    }
    for (int64_t i = 0; i < width; i++) sums[i] = 0;
    for (int64_t p = 0; p < pieces; p++) {
        const float* stat = stats + 2 * (p * heads + head);
        const float factor = pieces > 1 ? exp_approx(stat[0] - highest) : 1;
        const float* values = piece_sums + (p * heads + head) * width;
        sum += factor * stat[1];
        for (int64_t i = 0; i < width; i++) sums[i] += factor * values[i];
    }
    for (int64_t i = 0; i < width; i++)
        attention.out[head * width + i] = float_to_bfloat16(sums[i] / sum);
}

void attend(const TokenAttention& attention, int threads, Fork fork) {
    const int64_t heads = attention.heads, width = attention.width;
    const int64_t pieces = round_up(attention.positions, PIECE) / PIECE;
    const int64_t group_heads = heads / attention.groups;
    const float scale = 1 / __builtin_sqrtf(float(width));
    std::vector<float> q(static_cast<size_t>(heads * width));
    const std::unique_ptr<float[]> memory(new float[size_t(pieces * heads * (width + 2))]);
    float *stats = memory.get(), *sums = stats + pieces * 2 * heads;
    for (int64_t i = 0; i < heads * width; i++) q[i] = bfloat16_to_float(attention.q[i]) * scale;
    if (heads * width * attention.positions < MIN_PARALLEL / 8) threads = 1;
    parallel_for(attention.groups * pieces, threads, fork, [&](int64_t task, int) {
        const int64_t group = task / pieces, piece = task % pieces;
        const int64_t head = piece * heads + group * group_heads;
        const float* own = q.data() + group * group_heads * width;
        if (attention.codes)
            attend_group<CodeRows>(attention, group, piece, own, stats + 2 * head,
                                   sums + head * width);
        else
            attend_group<HalfRows>(attention, group, piece, own, stats + 2 * head,
                                   sums + head * width);
    });
    parallel_for(heads, pieces > 8 ? threads : 1, fork, [&](int64_t head, int) {
        merge_pieces(attention, pieces, head, stats, sums, q.data() + head * width);
    });
}

}  // namespace
