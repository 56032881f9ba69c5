// The kernels for any processor, and the plainest words for what the others do.

#pragma once

#include "matrix.h"

namespace {

struct Portable {
    static constexpr bool VECTORS = false, INTEGERS = false;
    static constexpr int64_t lanes(int64_t) { return 8; }

    static void look_up(const Matrix& m, const uint8_t* codes, int64_t size, const float* scales,
                        const float* zeros, float* out) {
        for (int64_t word = 0; word < 16; word++) {
            uint32_t bits;
            memcpy(&bits, codes + 4 * word, 4);
            float by = scales[8 * word / size], zero = zeros ? zeros[8 * word / size] : 0;
            for (int64_t p = 0; p < 8; p++)
                out[16 * p + word] = (m.table[bits >> 4 * p & 15] - zero) * by;
        }
    }

    static void direct(const Matrix& m, const float* x, int64_t pitch, int64_t tokens, int64_t row, int64_t size,
                       const Scratch& own, float* y) {
        const int64_t chunks = up(m.inputs, CHUNK) / CHUNK, tail = m.inputs % CHUNK;
        const uint8_t* codes = m.codes + row * (m.inputs / 2);
        float sums[DIRECT][16] = {}, values[CHUNK];
        uint8_t last[BYTES] = {};
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* from = codes + c * BYTES;
            if (tail && c == chunks - 1) from = static_cast<uint8_t*>(memcpy(last, from, tail / 2));
            int64_t at = c * (CHUNK / size);
            look_up(m, from, size, own.scales + at, m.zeros ? own.zeros + at : nullptr, values);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t p = 0; p < 8; p++)
                    for (int64_t i = 0; i < 16; i++)
                        sums[t][i] += values[16 * p + i] * x[t * pitch + c * CHUNK + 16 * p + i];
        }
        for (int64_t t = 0; t < tokens; t++) {
            float sum = 0;
            for (float each : sums[t]) sum += each;
            y[t * m.rows + row] = sum;
        }
    }

    static void gated(const float* gate, const float* up, int64_t count, float* out) {
        gated_values(gate, up, count, out);
    }

    static void tile(const float* w, int64_t rows, int64_t depth, const float* x, int64_t, float* sums) {
        for (int64_t row = 0; row < rows; row++) {
            float sum[8];
            memcpy(sum, sums + 8 * row, sizeof sum);
            for (int64_t k = 0; k < depth; k++)
                for (int64_t t = 0; t < 8; t++) sum[t] += w[row * PITCH + k] * x[8 * k + t];
            memcpy(sums + 8 * row, sum, sizeof sum);
        }
    }
};

}  // namespace
