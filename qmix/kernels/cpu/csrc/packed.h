// Matmuls with matrices in the packed layout (qmix/weights/packed/layout.py), where they lie in
// host memory.
//
// A byte holds the codes of two rows, one in each plane; the 16 bytes of a lane hold rows g and g +
// 8 and 32 inputs. Four lanes together, 64 bytes, are one register: 32 words, word t * 8 + c * 4 +
// r * 2 + j of row 8 r + g and inputs 16 j + 8 c + 2 t + {0, 1}. Codes of two and three bits, which
// are slices of bits (qmix/weights/packed/bit_slices.py), become such bytes, a tile at a time.
// Packing has rounded the scales already, so inputs are always 16-bit integers with a scale for
// each group.

#pragma once

#include "float_math.h"
#include "int16.h"
#include "matrix.h"
#include "structs.h"
#include "width_avx2.h"

namespace {

constexpr int64_t PANEL = 64;  // byte rows

// One token as 16-bit integers.
struct QuantizedTiles {
    const int16_t* x;     // [inputs / 32][64 places]
    const float* scales;  // [groups]
};

constexpr int64_t SLICED_INPUTS = 128;  // of a tile
constexpr int64_t SLICE_BYTES = 2048;   // of one bit of a tile

// Bytes of a tile's codes; those of its scales, and of its zeros.
int64_t code_bytes(const TiledMatrix& matrix) {
    return PANEL * matrix.tile_inputs * matrix.bits / 4;
}
int64_t scale_bytes(const TiledMatrix& matrix) {
    return PANEL * 4 * (matrix.tile_inputs / matrix.group_inputs);
}

// A tile in slices as bytes of two codes. In a word of a slice, block b of 32 inputs has in each
// half the pairs (plane, j) = (0, 0), (0, 1), (1, 0), (1, 1) at bits 0, 2, 4 and 6 once it is
// rotated: the two of a j are as far apart as they are in a byte.
template <int BITS>
void bytes_of_slices(const uint8_t* tile, uint8_t* bytes) {
    const uint32_t* slices = reinterpret_cast<const uint32_t*>(tile);
    uint32_t* out = reinterpret_cast<uint32_t*>(bytes);
    constexpr int64_t WORDS = SLICE_BYTES / 4;
    constexpr int UPPER_ROTATIONS[4] = {0, 1, 8, 9};
    for (int64_t block = 0; block < 4; block++, out += WORDS) {
        const uint32_t* lower = slices + block / 2 * WORDS;
        const uint32_t* upper = slices + 2 * WORDS;
        const int shift = block % 2 * 8, rotation = UPPER_ROTATIONS[block];
        for (int64_t i = 0; i < WORDS; i++) {
            const uint32_t low = lower[i] >> shift;
            uint32_t even = low & 0x00330033, odd = low >> 2 & 0x00330033;
            if (BITS == 3) {
                const uint32_t high = upper[i] >> rotation | upper[i] << (32 - rotation) % 32;
                even |= high & 0x00440044;
                odd |= high >> 2 & 0x00440044;
            }
            // The bytes of both p of j = 0, then those of j = 1.
            out[i] = (even | even >> 8) & 0xffff | (odd << 8 | odd << 16) & 0xffff0000;
        }
    }
}

// One group of a panel's rows: its codes as bytes, its scales and its zeros.
struct TileGroup {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;
};

// The groups of a panel in order.
class TileGroups {
public:
    TileGroups(const TiledMatrix& matrix, int64_t panel)
        : matrix_(matrix), per_tile_(matrix.tile_inputs / matrix.group_inputs) {
        const int64_t tiles = matrix.inputs / matrix.tile_inputs;
        bytes_ = code_bytes(matrix) + scale_bytes(matrix) * (matrix.zeros ? 2 : 1);
        first_ = matrix.tiles + panel * tiles * bytes_;
    }

    // Asked for one after the other.
    TileGroup group(int64_t number) {
        const uint8_t* tile = first_ + number / per_tile_ * bytes_;
        const int64_t within = number % per_tile_;
        const uint8_t* codes = tile;
        if (matrix_.bits < 4) {
            if (!within && matrix_.bits == 2) bytes_of_slices<2>(tile, expanded_);
            if (!within && matrix_.bits == 3) bytes_of_slices<3>(tile, expanded_);
            codes = expanded_;
        }
        const uint8_t* scales = tile + code_bytes(matrix_) + within * PANEL * 4;
        return {codes + within * PANEL * matrix_.group_inputs, scales,
                scales + scale_bytes(matrix_)};
    }

private:
    const TiledMatrix& matrix_;
    const uint8_t* first_;
    int64_t bytes_, per_tile_;
    alignas(64) uint8_t expanded_[PANEL * SLICED_INPUTS];
};

int64_t packed_input_at(int64_t p, int64_t word) {
    return 16 * (word % 2) + 8 * (word / 4 % 2) + 2 * (word / 8) + p;
}

// Which of the 64 bytes of four lanes the input at a place is multiplied by.
int64_t byte_at(int64_t place) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // The order that unpacking leaves, as in arrange_unpacked.
    return place / 32 * 32 + place / 8 % 2 * 16 + place / 16 % 2 * 8 + place % 8;
#else
    return place % 32 * 2 + place / 32;
#endif
}

// Quantizes the inputs of one token; each stands twice, once for either row of a lane.
void quantize_tiles(const TiledMatrix& matrix, const IntegerTable& table, const float* x,
                    int16_t* out, float* scales) {
    for (int64_t group = 0; group < matrix.inputs / matrix.group_inputs;
         group++, x += matrix.group_inputs) {
        float largest = 0, poison = 0;
        for (int64_t i = 0; i < matrix.group_inputs; i++) {
            const float magnitude = x[i] < 0 ? -x[i] : x[i];
            largest = magnitude > largest ? magnitude : largest;
            poison += x[i] * 0;
        }
        const float factor = largest > 0 ? table.max_activation / largest : 0;
        const bool finite = poison == 0 && factor < 3e38f;
        scales[group] = poison + (finite ? largest / (table.max_activation * table.factor) : 0);
        for (int64_t first = 0; first < matrix.group_inputs; first += 32)
            for (int64_t place = 0; place < 64; place++) {
                const int64_t byte = byte_at(place);
                const float input = x[first + packed_input_at(byte % 2, byte / 2)];
                *out++ = finite ? int16_t(__builtin_rintf(input * factor)) : 0;
            }
    }
}

// The scales (or zeros) of a group as [warp][g][plane][r].
void read_tile_scales(const uint8_t* section, float* out) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(section);
    for (int64_t row = 0; row < PANEL; row++)
        for (int64_t plane = 0; plane < 2; plane++)
            out[row / 16 * 32 + row % 8 * 4 + plane * 2 + row / 8 % 2] =
                half_to_float(bits[2 * row + plane]);
}

void multiply_panel_portable(const TiledMatrix& matrix, const IntegerTable& table, int64_t panel,
                             const QuantizedTiles& in, float* low, float* high) {
    const int64_t groups = matrix.inputs / matrix.group_inputs;
    TileGroups of_panel(matrix, panel);
    float sums[2][PANEL] = {}, scales[2 * PANEL], zeros[2 * PANEL] = {};
    for (int64_t i = 0; i < groups; i++) {
        const TileGroup group = of_panel.group(i);
        read_tile_scales(group.scales, scales);
        if (matrix.zeros) read_tile_scales(group.zeros, zeros);
        for (int64_t row = 0; row < PANEL; row++) {
            const int64_t warp = row / 16, r = row / 8 % 2, g = row % 8;
            const int64_t at = warp * 32 + g * 4 + r;
            int64_t plane_sums[2] = {};  // 64 products of 16383 * 16383 do not fit 32 bits
            for (int64_t part = 0; part < matrix.group_inputs / 32; part++)
                for (int64_t word = 2 * r; word < 32; word += word % 2 ? 3 : 1)
                    for (int64_t p = 0; p < 2; p++) {
                        const uint8_t codes =
                            group.codes[part * 2048 + warp * 512 + g * 64 + 2 * word + p];
                        const int32_t x =
                            in.x[i * 2 * matrix.group_inputs + part * 64 + p * 32 + word];
                        plane_sums[0] += (table.values[codes & 15] + int32_t(zeros[at])) * x;
                        plane_sums[1] += (table.values[codes >> 4] + int32_t(zeros[at + 2])) * x;
                    }
            for (int plane = 0; plane < 2; plane++)
                sums[plane][row] +=
                    float(plane_sums[plane]) * (scales[at + 2 * plane] * in.scales[i]);
        }
    }
    for (int64_t row = 0; row < PANEL; row++) {
        low[row] = sums[0][row] * matrix.powers[0];
        high[row] = sums[1][row] * matrix.powers[1];
    }
}

#if defined(__AVX512F__)

inline __m512 spread_pair(const float* pair) {
    double bits;
    memcpy(&bits, pair, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(bits));
}

template <bool ZEROS>
void multiply_panel_avx512(const TiledMatrix& matrix, const IntegerTable& integers,
                                       int64_t panel, const QuantizedTiles& in, float* low,
                                       float* high) {
    const int64_t groups = matrix.inputs / matrix.group_inputs;
    TileGroups of_panel(matrix, panel);
    const __m512i table = _mm512_loadu_si512(integers.values);
    alignas(64) float sums[32][2][16] = {};
    alignas(64) float scales[2 * PANEL], zeros[2 * PANEL];
    for (int64_t i = 0; i < groups; i++) {
        const TileGroup group = of_panel.group(i);
        read_tile_scales(group.scales, scales);
        if (ZEROS) read_tile_scales(group.zeros, zeros);
        const __m512 input_scale = _mm512_set1_ps(in.scales[i]);
        for (int64_t at = 0; at < 32; at++) {  // warp * 8 + g
            __m512i plane_sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            __m512i zero[2] = {plane_sums[0], plane_sums[0]};
            if (ZEROS)
                for (int plane = 0; plane < 2; plane++) {
                    zero[plane] = _mm512_cvtps_epi32(spread_pair(zeros + 4 * at + 2 * plane));
                    zero[plane] =
                        _mm512_or_si512(_mm512_slli_epi32(zero[plane], 16),
                                        _mm512_and_si512(zero[plane], _mm512_set1_epi32(0xffff)));
                }
            const int16_t* x = in.x + i * 2 * matrix.group_inputs;
            for (int64_t part = 0; part < matrix.group_inputs / 32; part++, x += 64) {
                const uint8_t* source = group.codes + part * 2048 + at * 64;
                prefetch_codes(source);
                const __m512i words = _mm512_loadu_si512(source);
#pragma GCC unroll 4
                for (int nibble = 0; nibble < 4; nibble++) {
                    const int plane = nibble % 2, p = nibble / 2;
                    __m512i values =
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * nibble), table);
                    if (ZEROS) values = _mm512_add_epi16(values, zero[plane]);
                    plane_sums[plane] =
                        _mm512_add_epi32(plane_sums[plane],
                                         _mm512_madd_epi16(values, _mm512_loadu_si512(x + 32 * p)));
                }
            }
            for (int plane = 0; plane < 2; plane++) {
                const __m512 scale =
                    _mm512_mul_ps(spread_pair(scales + 4 * at + 2 * plane), input_scale);
                const __m512 sum = _mm512_load_ps(sums[at][plane]);
                _mm512_store_ps(sums[at][plane],
                                _mm512_fmadd_ps(_mm512_cvtepi32_ps(plane_sums[plane]), scale, sum));
            }
        }
    }
    float* const planes[2] = {low, high};
    for (int64_t at = 0; at < 32; at++)
        for (int plane = 0; plane < 2; plane++)
            for (int r = 0; r < 2; r++) {
                float sum = 0;
                for (int lane = r; lane < 16; lane += 2) sum += sums[at][plane][lane];
                planes[plane][at / 8 * 16 + 8 * r + at % 8] = sum * matrix.powers[plane];
            }
}

#elif defined(__AVX2__)

// The values of two rows of a lane, each in two of its four 32-bit words.
inline __m256 spread_pair(const float* pair) {
    const __m128 values = _mm_setr_ps(pair[0], pair[0], pair[1], pair[1]);
    return _mm256_set_m128(values, values);
}

template <bool ZEROS>
void multiply_panel_avx2(const TiledMatrix& matrix, const IntegerTable& integers, int64_t panel,
                         const QuantizedTiles& in, float* low, float* high) {
    typedef avx2::Width Width;
    const int64_t groups = matrix.inputs / matrix.group_inputs;
    TileGroups of_panel(matrix, panel);
    const Width::Table table(integers);
    float sums[32][2][8] = {}, scales[2 * PANEL], zeros[2 * PANEL] = {};
    for (int64_t i = 0; i < groups; i++) {
        const TileGroup group = of_panel.group(i);
        read_tile_scales(group.scales, scales);
        if (ZEROS) read_tile_scales(group.zeros, zeros);
        for (int64_t at = 0; at < 32; at++) {  // warp * 8 + g
            __m256 plane_sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            __m256i zero[2];
            for (int plane = 0; plane < 2; plane++) {
                const __m256i wide = _mm256_cvtps_epi32(spread_pair(zeros + 4 * at + 2 * plane));
                zero[plane] = _mm256_packs_epi32(wide, wide);
                zero[plane] = _mm256_unpacklo_epi32(zero[plane], zero[plane]);
            }
            const __m256i* x =
                reinterpret_cast<const __m256i*>(in.x + i * 2 * matrix.group_inputs);
            for (int64_t part = 0; part < matrix.group_inputs / 32; part++, x += 4) {
                const uint8_t* source = group.codes + part * 2048 + at * 64;
                prefetch_codes(source);
                __m256i products[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++) {
                    const Width::Values values = Width::lookup(Width::load(source + 32 * r), table);
#pragma GCC unroll 4
                    for (int k = 0; k < 4; k++) {
                        __m256i words = values.words[k];
                        if (ZEROS) words = _mm256_add_epi16(words, zero[k / 2]);
                        products[k / 2] = _mm256_add_epi32(
                            products[k / 2],
                            _mm256_madd_epi16(words, _mm256_loadu_si256(x + 2 * r + k % 2)));
                    }
                }
                // Eight products a word, as many as 32 bits hold.
                for (int plane = 0; plane < 2; plane++)
                    plane_sums[plane] =
                        _mm256_add_ps(plane_sums[plane], _mm256_cvtepi32_ps(products[plane]));
            }
            for (int plane = 0; plane < 2; plane++) {
                const __m256 scale = _mm256_mul_ps(spread_pair(scales + 4 * at + 2 * plane),
                                                   _mm256_set1_ps(in.scales[i]));
                const __m256 sum = _mm256_loadu_ps(sums[at][plane]);
                _mm256_storeu_ps(sums[at][plane],
                                 _mm256_fmadd_ps(plane_sums[plane], scale, sum));
            }
        }
    }
    float* const planes[2] = {low, high};
    for (int64_t at = 0; at < 32; at++)
        for (int plane = 0; plane < 2; plane++)
            for (int r = 0; r < 2; r++) {
                const float* lanes = sums[at][plane] + 2 * r;
                const float sum = (lanes[0] + lanes[1]) + (lanes[4] + lanes[5]);
                planes[plane][at / 8 * 16 + 8 * r + at % 8] = sum * matrix.powers[plane];
            }
}

#endif

// One panel of 64 byte rows times one token: the rows of the low plane and those of the high one.
void multiply_panel(const TiledMatrix& matrix, const IntegerTable& table, int64_t panel,
                    const QuantizedTiles& in, float* low, float* high) {
#if defined(__AVX512F__)
    return matrix.zeros ? multiply_panel_avx512<true>(matrix, table, panel, in, low, high)
                        : multiply_panel_avx512<false>(matrix, table, panel, in, low, high);
#elif defined(__AVX2__)
    return matrix.zeros ? multiply_panel_avx2<true>(matrix, table, panel, in, low, high)
                        : multiply_panel_avx2<false>(matrix, table, panel, in, low, high);
#else
    multiply_panel_portable(matrix, table, panel, in, low, high);
#endif
}

}  // namespace
