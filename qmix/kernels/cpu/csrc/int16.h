// Matmuls in integers: the table of a weight and its activations as 16-bit integers.

#pragma once

#include "isa.h"
#include "matrix.h"

namespace {

constexpr float MAX_OF_BYTES = 127 * 256 + 127;  // an activation as the sum of two signed bytes
// The largest value of a table in tiles: both factors of a product then err by as much. FP4's
// values are multiples of a 192nd, so they are exact.
constexpr float TILE_VALUE = 42 * 192;
constexpr int MAX_CODE = 63;  // 4 * 63 * 128, the sum of four products, fits 16 bits

// The table as integers, `values[code] / factor`.
//
// The limits keep the sum of eight products, which one 32-bit lane holds, below 2^31: with table
// values of up to 16383 or 256 and activations of up to `max_activation`. What adds up more
// products in a lane must lower the limits itself. Tables of integers, and of halves, are exact.
struct IntegerTable {
    int16_t values[32];  // the sixteen twice: the fifth bit of an index belongs to another code
    int16_t lowest;       // of them and of 0
    float factor, max_activation;
    bool linear;  // value = code + values[0]; activations are then sums of two signed bytes
    bool small;   // no two values are more than MAX_CODE apart

    // `most`: the largest value of a table that is not exact.
    explicit IntegerTable(const float* table, float most = 16383)
        : factor(most), max_activation(16383), linear(true) {
        float largest = 0;
        bool integral = true, halves = true;
        for (int i = 0; i < 16; i++) {
            const float magnitude = table[i] < 0 ? -table[i] : table[i];
            largest = magnitude > largest ? magnitude : largest;
            const bool small = magnitude <= 128;
            integral = integral && small && table[i] == float(int(table[i]));
            halves = halves && small && 2 * table[i] == float(int(2 * table[i]));
            linear = linear && table[i] == table[0] + float(i);
        }
        linear = linear && integral && largest <= 16;
        if (linear) {
            factor = 1, max_activation = MAX_OF_BYTES;
        } else if (halves) {
            factor = integral ? 1 : 2, max_activation = 32767;
        } else {
            factor = largest > 0 ? most / largest : 1;
        }
        int16_t highest = 0;
        lowest = 0;
        for (int i = 0; i < 32; i++) {
            values[i] = int16_t(__builtin_rintf(table[i % 16] * factor));
            lowest = values[i] < lowest ? values[i] : lowest;
            highest = values[i] > highest ? values[i] : highest;
        }
        small = highest - lowest <= MAX_CODE;
    }

    // The table of a matrix. Codes of more than 4 bits are linear.
    explicit IntegerTable(const Matrix& weight, float most = 16383)
        : IntegerTable(weight.table, most) {
        if (weight.bits <= 4) return;
        factor = 1, max_activation = MAX_OF_BYTES, linear = true;
        values[0] = int16_t(weight.table[0]);
    }
};

// The inputs of a chunk in the order that unpacking leaves: eight bytes of each 16-byte lane of a
// register, then the other eight. Of codes of 4 bits, CODES = 2, those in the low nibbles come
// first.
template <int CODES, int LANES>
void arrange_unpacked(const int16_t* words, int16_t* out, int32_t high_first = 0) {
    for (int r = 0; r < 4 / LANES; r++, words += 16 * CODES * LANES)
        for (int odd = 0; odd < CODES; odd++)
            for (int part = 0; part < 2; part++)
                for (int lane = 0; lane < LANES; lane++, out += 8) {
                    const int16_t* from = words + CODES * (16 * lane + 8 * part);
                    for (int i = 0; i < 8; i++) out[i] = from[CODES * i + (odd ^ high_first)];
                }
}

// 256 high + low, both signed bytes: for each register of BYTES bytes the high ones, then the low
// ones.
template <int BYTES>
void arrange_planes(const int16_t* words, int16_t* out) {
    int8_t* planes = reinterpret_cast<int8_t*>(out);
    for (int r = 0; r < 64 / BYTES; r++, words += BYTES, planes += 2 * BYTES)
        for (int i = 0; i < BYTES; i++) {
            planes[i] = int8_t((words[i] + 128) >> 8);
            planes[BYTES + i] = int8_t(words[i]);
        }
}

// Tokens as 16-bit integers.
struct QuantizedInputs {
    const int16_t* x;     // [tokens][inputs of chunks], in the order of Kernels::quantize_chunk
    const float* scales;  // [tokens][chunks]
    const float* totals;  // linear tables: [tokens][chunks][MAX_UNITS], sums of a unit's inputs
    int64_t tokens;
};

}  // namespace
