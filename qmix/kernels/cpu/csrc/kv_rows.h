// How the keys of a head, or its values, lie in memory at each position: bfloat16, or codes of 8 bits
// with the bytes of a float behind them, the step from one code to the next.

#pragma once

#include <cstring>

#include "float_math.h"

namespace {

struct HalfRows {
    typedef uint16_t Element;
    static constexpr bool HAS_STEPS = false;
    static int64_t size(int64_t width) { return width; }
    QMIX_INLINE static float value(uint16_t bits) { return bfloat16_to_float(bits); }
    QMIX_INLINE static float step(const uint16_t*, int64_t) { return 1; }
};

struct CodeRows {
    typedef int8_t Element;
    static constexpr bool HAS_STEPS = true;
    static int64_t size(int64_t width) { return width + int64_t(sizeof(float)); }
    QMIX_INLINE static float value(int8_t code) { return code; }
    QMIX_INLINE static float step(const int8_t* row, int64_t width) {
        float found;
        memcpy(&found, row + width, sizeof found);
        return found;
    }
};

// What kv_rows.quantized makes of x [width], to the bit. Infinity and NaN give a row of NaN.
inline void quantize_row(const uint16_t* x, int64_t width, int8_t* row) {
    int largest = 0;  // as bits without a sign, of which those of NaN are the largest
    for (int64_t i = 0; i < width; i++) {
        const int bits = x[i] & 0x7fff;
        largest = bits > largest ? bits : largest;
    }
    constexpr float LEAST = 1.17549435e-38f;  // of rows of zeros
    float step = bfloat16_to_float(uint16_t(largest)) / 127;
    step = step < LEAST ? LEAST : step;  // NaN stays NaN
    const float inverse = 1 / step;
    for (int64_t i = 0; i < width; i++) {
        const float code = __builtin_rintf(bfloat16_to_float(x[i]) * inverse);
        row[i] = code == code ? int8_t(code) : int8_t(0);
    }
    memcpy(row + width, &step, sizeof step);
}

}  // namespace
