// Products of matrices in the GPU's packed layout (qmix/weights/packed/layout.py), as they lie in host memory.
//
// A byte holds the codes of two rows, one a plane; 16 bytes of a lane hold rows g and g + 8 and 32 inputs.
// Four lanes together, 64 bytes, are one register: 32 words, word t * 8 + c * 4 + r * 2 + j of row
// 8 r + g and inputs 16 j + 8 c + 2 t + {0, 1}. What packing rounded is rounded already, so inputs are
// 16-bit integers by a scale a tile, whatever they were before.

#pragma once

#include "matrix.h"

extern "C" {

struct Packed {                 // [2 * byte_rows, inputs]
    const uint8_t* tiles;       // behind the header
    const float* powers;        // [2], what the planes' scales are multiplied by
    const float* table;         // [16], before the zero
    int64_t byte_rows, inputs, tile_inputs;
    int32_t zeros;              // whether tiles hold them: 8 less the zero, to be added
};

}  // extern "C"

namespace {

constexpr int64_t PANEL = 64;   // byte rows

struct PackedInputs {
    const int16_t* x;           // a token's: [inputs / 32][2][32 words]
    const float* scales;        // [tiles]
};

int64_t tile_bytes(const Packed& m) { return PANEL * m.tile_inputs + PANEL * 4 * (m.zeros ? 2 : 1); }

int64_t packed_input_at(int64_t p, int64_t word) {
    return 16 * (word % 2) + 8 * (word / 4 % 2) + 2 * (word / 8) + p;
}

// One token's inputs as integers; each stands twice, once for both rows of a lane.
void arrange_packed(const Packed& m, const Integers& integers, const float* x, int16_t* to, float* scales) {
    for (int64_t tile = 0; tile < m.inputs / m.tile_inputs; tile++, x += m.tile_inputs) {
        float largest = 0, poison = 0;
        for (int64_t i = 0; i < m.tile_inputs; i++) {
            const float size = x[i] < 0 ? -x[i] : x[i];
            largest = size > largest ? size : largest;
            poison += x[i] * 0;
        }
        const float by = largest > 0 ? integers.largest_input / largest : 0;
        const bool sound = poison == 0 && by < 3e38f;
        scales[tile] = poison + (sound ? largest / (integers.largest_input * integers.by) : 0);
        for (int64_t half = 0; half < m.tile_inputs; half += 32)
            for (int64_t p = 0; p < 2; p++)
                for (int64_t word = 0; word < 32; word++)
                    *to++ = sound ? int16_t(__builtin_rintf(x[half + packed_input_at(p, word)] * by)) : 0;
    }
}

// The scales (or zeros) of a tile as [warp][g][plane][r].
void packed_scales(const uint8_t* section, float* out) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(section);
    for (int64_t row = 0; row < PANEL; row++)
        for (int64_t plane = 0; plane < 2; plane++)
            out[row / 16 * 32 + row % 8 * 4 + plane * 2 + row / 8 % 2] = half(bits[2 * row + plane]);
}

void packed_panel_portable(const Packed& m, const Integers& integers, int64_t panel, const PackedInputs& in,
                           float* low, float* high) {
    const int64_t tiles = m.inputs / m.tile_inputs, size = tile_bytes(m);
    const uint8_t* tile = m.tiles + panel * tiles * size;
    float sums[2][PANEL] = {}, scales[2 * PANEL], zeros[2 * PANEL] = {};
    for (int64_t i = 0; i < tiles; i++, tile += size) {
        packed_scales(tile + PANEL * m.tile_inputs, scales);
        if (m.zeros) packed_scales(tile + PANEL * m.tile_inputs + PANEL * 4, zeros);
        for (int64_t row = 0; row < PANEL; row++) {
            const int64_t warp = row / 16, r = row / 8 % 2, g = row % 8, at = warp * 32 + g * 4 + r;
            int32_t both[2] = {};
            for (int64_t part = 0; part < m.tile_inputs / 32; part++)
                for (int64_t word = 2 * r; word < 32; word += word % 2 ? 3 : 1)
                    for (int64_t p = 0; p < 2; p++) {
                        const uint8_t codes = tile[part * 2048 + warp * 512 + g * 64 + 2 * word + p];
                        const int32_t x = in.x[i * 2 * m.tile_inputs + part * 64 + p * 32 + word];
                        both[0] += (integers.values[codes & 15] + int32_t(zeros[at])) * x;
                        both[1] += (integers.values[codes >> 4] + int32_t(zeros[at + 2])) * x;
                    }
            for (int plane = 0; plane < 2; plane++)
                sums[plane][row] += float(both[plane]) * (scales[at + 2 * plane] * in.scales[i]);
        }
    }
    for (int64_t row = 0; row < PANEL; row++) {
        low[row] = sums[0][row] * m.powers[0];
        high[row] = sums[1][row] * m.powers[1];
    }
}

#if defined(__x86_64__)

inline QMIX_AVX512 __m512 packed_pair(const float* pair) {
    double both;
    memcpy(&both, pair, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
}

template <bool ZEROS>
QMIX_AVX512 void packed_panel_avx512(const Packed& m, const Integers& integers, int64_t panel, const PackedInputs& in,
                                     float* low, float* high) {
    const int64_t tiles = m.inputs / m.tile_inputs, size = tile_bytes(m);
    const uint8_t* tile = m.tiles + panel * tiles * size;
    const __m512i table = _mm512_loadu_si512(integers.values);
    alignas(64) float sums[32][2][16] = {};
    alignas(64) float scales[2 * PANEL], zeros[2 * PANEL];
    for (int64_t i = 0; i < tiles; i++, tile += size) {
        packed_scales(tile + PANEL * m.tile_inputs, scales);
        if (ZEROS) packed_scales(tile + PANEL * m.tile_inputs + PANEL * 4, zeros);
        const __m512 by = _mm512_set1_ps(in.scales[i]);
        for (int64_t at = 0; at < 32; at++) {  // warp * 8 + g
            __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, zero[2] = {both[0], both[0]};
            if (ZEROS)
                for (int plane = 0; plane < 2; plane++) {
                    zero[plane] = _mm512_cvtps_epi32(packed_pair(zeros + 4 * at + 2 * plane));
                    zero[plane] = _mm512_or_si512(_mm512_slli_epi32(zero[plane], 16),
                                                  _mm512_and_si512(zero[plane], _mm512_set1_epi32(0xffff)));
                }
            const int16_t* x = in.x + i * 2 * m.tile_inputs;
            for (int64_t part = 0; part < m.tile_inputs / 32; part++, x += 64) {
                const uint8_t* from = tile + part * 2048 + at * 64;
                ahead(from);
                const __m512i words = _mm512_loadu_si512(from);
#pragma GCC unroll 4
                for (int nibble = 0; nibble < 4; nibble++) {
                    const int plane = nibble % 2, p = nibble / 2;
                    __m512i values = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * nibble), table);
                    if (ZEROS) values = _mm512_add_epi16(values, zero[plane]);
                    both[plane] = _mm512_add_epi32(both[plane],
                                                   _mm512_madd_epi16(values, _mm512_loadu_si512(x + 32 * p)));
                }
            }
            for (int plane = 0; plane < 2; plane++) {
                const __m512 scale = _mm512_mul_ps(packed_pair(scales + 4 * at + 2 * plane), by);
                const __m512 sum = _mm512_load_ps(sums[at][plane]);
                _mm512_store_ps(sums[at][plane], _mm512_fmadd_ps(_mm512_cvtepi32_ps(both[plane]), scale, sum));
            }
        }
    }
    for (int64_t at = 0; at < 32; at++)
        for (int plane = 0; plane < 2; plane++)
            for (int r = 0; r < 2; r++) {
                float sum = 0;
                for (int lane = r; lane < 16; lane += 2) sum += sums[at][plane][lane];
                (plane ? high : low)[at / 8 * 16 + 8 * r + at % 8] = sum * m.powers[plane];
            }
}

#endif

void packed_panel(const Packed& m, const Integers& integers, int32_t isa, int64_t panel, const PackedInputs& in,
                  float* low, float* high) {
#if defined(__x86_64__)
    if (isa >= AVX512)
        return m.zeros ? packed_panel_avx512<true>(m, integers, panel, in, low, high)
                       : packed_panel_avx512<false>(m, integers, panel, in, low, high);
#endif
    (void)isa;
    packed_panel_portable(m, integers, panel, in, low, high);
}

}  // namespace
