// Matmuls in integers: the table of a weight and its activations as 16-bit integers.

#pragma once

#include "isa.h"

namespace {

// The table as integers, `values[code] / factor`.
//
// The limits keep the sum of eight products, which one 32-bit lane holds, below 2^31: with table
// values of up to 16383 or 16 and activations of up to `max_activation`. What adds up more products
// in a lane must lower the limits itself.
struct IntegerTable {
    int16_t values[32];  // the sixteen twice: the fifth bit of an index belongs to another code
    float factor, max_activation;
    bool linear;  // value = code + values[0]; activations are then sums of two signed bytes

    explicit IntegerTable(const float* table) : factor(1), max_activation(32767), linear(true) {
        float largest = 0;
        bool integral = true;
        for (int i = 0; i < 16; i++) {
            const float magnitude = table[i] < 0 ? -table[i] : table[i];
            largest = magnitude > largest ? magnitude : largest;
            integral = integral && table[i] == float(int(table[i]));
            linear = linear && table[i] == table[0] + float(i);
        }
        linear = linear && integral && largest <= 16;
        if (linear) {
            max_activation = 127 * 256 + 127;
        } else if (!integral || largest > 16) {
            max_activation = 16383;
            factor = largest > 0 ? 16383 / largest : 1;
        }
        for (int i = 0; i < 32; i++) values[i] = int16_t(__builtin_rintf(table[i % 16] * factor));
    }
};

// Tokens as 16-bit integers.
struct QuantizedInputs {
    const int16_t* x;     // [tokens][chunks * CHUNK], in the order of `Vnni::quantize_chunk`
    const float* scales;  // [tokens][chunks]
    const float*
        totals;  // linear tables: [tokens][chunks][4], sums of the inputs of each scale unit
    int64_t tokens;
};

}  // namespace
