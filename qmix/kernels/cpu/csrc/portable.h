// The matmul kernels for any processor, and the plainest words for what the others do.

#pragma once

#include "matrix.h"

namespace {

struct Portable {
    static constexpr bool VECTORS = false, INT16 = false, INT16_TILES = false;
    static constexpr bool BFLOAT16_TILES = false;
    static constexpr int64_t BFLOAT16_ROWS = 0, BFLOAT16_TOKENS = 0;
    static constexpr int64_t lanes(int64_t) { return 8; }

    // Decodes the 64 bytes of a chunk into arranged float32. Scales and shifts are those of its
    // units.
    template <class Format>
    static void decode_chunk(const Matrix& weight, const uint8_t* codes, int64_t unit,
                             const float* scales, const float* shifts, float* out) {
        constexpr int WORD = Format::WORD;
        for (int64_t word = 0; word < 16; word++) {
            uint32_t bits;
            memcpy(&bits, codes + 4 * word, 4);
            const float scale = scales[WORD * word / unit];
            const float shift = Format::SHIFT == NONE ? 0 : shifts[WORD * word / unit];
            for (int64_t p = 0; p < WORD; p++) {
                const uint32_t code = bits >> Format::BITS * p & ((1u << Format::BITS) - 1);
                const float value = Format::BITS == 8 ? float(code) : weight.table[code];
                out[16 * p + word] =
                    Format::SHIFT == BIASES ? value * scale + shift : (value - shift) * scale;
            }
        }
    }

    // y [tokens, rows]: the codes of one row times up to DIRECT_TOKENS arranged tokens, x of each
    // `pitch` apart.
    template <class Format>
    static void multiply_row(const Matrix& weight, const uint8_t* codes, const float* x,
                             int64_t pitch, int64_t tokens, int64_t row, int64_t unit,
                             const Scratch& scratch, float* y) {
        constexpr int64_t CHUNK = Format::CHUNK;
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK;
        const int64_t tail = weight.inputs % CHUNK;
        float sums[DIRECT_TOKENS][16] = {}, values[CHUNK];
        uint8_t last[CHUNK_BYTES] = {};
        for (int64_t c = 0; c < chunks; c++) {
            const uint8_t* source = codes + c * CHUNK_BYTES;
            if (tail && c == chunks - 1)
                source = static_cast<uint8_t*>(memcpy(last, source, tail * Format::BITS / 8));
            const int64_t first = c * (CHUNK / unit);
            decode_chunk<Format>(weight, source, unit, scratch.scales + first,
                                 scratch.shifts + first, values);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t p = 0; p < Format::WORD; p++)
                    for (int64_t i = 0; i < 16; i++)
                        sums[t][i] += values[16 * p + i] * x[t * pitch + c * CHUNK + 16 * p + i];
        }
        for (int64_t t = 0; t < tokens; t++) {
            float sum = 0;
            for (float lane : sums[t]) sum += lane;
            y[t * weight.rows + row] = sum;
        }
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
