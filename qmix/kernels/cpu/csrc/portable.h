// The matmul kernels for any processor, and the plainest words for what the others do.

#pragma once

#include "matrix.h"

namespace {

struct Portable {
    static constexpr bool VECTORS = false, INT16 = false;
    static constexpr int64_t lanes(int64_t) { return 8; }

    // Decodes the 64 bytes of a chunk into arranged float32. Scales and zeros are those of its
    // units.
    static void decode_chunk(const Matrix& weight, const uint8_t* codes, int64_t unit,
                             const float* scales, const float* zeros, float* out) {
        for (int64_t word = 0; word < 16; word++) {
            uint32_t bits;
            memcpy(&bits, codes + 4 * word, 4);
            float scale = scales[8 * word / unit], zero = zeros ? zeros[8 * word / unit] : 0;
            for (int64_t p = 0; p < 8; p++)
                out[16 * p + word] = (weight.table[bits >> 4 * p & 15] - zero) * scale;
        }
    }

    // y [tokens, rows]: one row times up to DIRECT_TOKENS arranged tokens, x of each `pitch` apart.
    static void multiply_row(const Matrix& weight, const float* x, int64_t pitch, int64_t tokens,
                             int64_t row, int64_t unit, const Scratch& scratch, float* y) {
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK;
        const int64_t tail = weight.inputs % CHUNK;
        const uint8_t* codes = weight.codes + row * (weight.inputs / 2);
        float sums[DIRECT_TOKENS][16] = {}, values[CHUNK];
        uint8_t last[CHUNK_BYTES] = {};
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* source = codes + c * CHUNK_BYTES;
            if (tail && c == chunks - 1)
                source = static_cast<uint8_t*>(memcpy(last, source, tail / 2));
            int64_t first = c * (CHUNK / unit);
            decode_chunk(weight, source, unit, scratch.scales + first,
                         weight.zeros ? scratch.zeros + first : nullptr, values);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t p = 0; p < 8; p++)
                    for (int64_t i = 0; i < 16; i++)
                        sums[t][i] += values[16 * p + i] * x[t * pitch + c * CHUNK + 16 * p + i];
        }
        for (int64_t t = 0; t < tokens; t++) {
            float sum = 0;
            for (float lane : sums[t]) sum += lane;
            y[t * weight.rows + row] = sum;
        }
    }

    static void swiglu(const float* gate, const float* up, int64_t count, float* out) {
        swiglu_values(gate, up, count, out);
    }

    // sums [rows][lanes] += a decoded tile [rows, depth] times a panel of tokens x [depth][lanes].
    static void multiply_tile(const float* tile, int64_t rows, int64_t depth, const float* x,
                              int64_t, float* sums) {
        for (int64_t row = 0; row < rows; row++) {
            float sum[8];
            memcpy(sum, sums + 8 * row, sizeof sum);
            for (int64_t k = 0; k < depth; k++)
                for (int64_t t = 0; t < 8; t++) sum[t] += tile[row * TILE_PITCH + k] * x[8 * k + t];
            memcpy(sums + 8 * row, sum, sizeof sum);
        }
    }
};

}  // namespace
