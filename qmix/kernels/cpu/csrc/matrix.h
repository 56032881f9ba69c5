// Reading a 4-bit matrix: its scales, its codes, and the order that the matmuls want inputs in.
//
// A chunk is 128 inputs of a row: 64 bytes, 16 little-endian words of 8 codes. Shifted right by 4
// p, the low bits of the words are 16 codes that index a table in registers. Inputs are therefore
// arranged in the order [p][word] within a chunk, and codes never are.

#pragma once

#include "float_math.h"
#include "structs.h"

namespace {

constexpr int64_t CHUNK = 128;  // inputs
constexpr int64_t CHUNK_BYTES = CHUNK / 2;
constexpr int64_t NESTED_BLOCK = 256;
constexpr int64_t DIRECT_TOKENS = 4;  // at most this many are multiplied while codes are looked up
constexpr int64_t INT16_TOKENS = 16;  // of an int16 matmul at a time: they fit the second cache
constexpr int64_t ROWS_AT_ONCE = 4;   // of an int16 matmul of one token
constexpr int64_t MAX_TOKENS = 512;   // arranged at a time
constexpr int64_t PANEL_TOKENS = 32;  // at most, in the panels of a tiled matmul
constexpr int64_t TILE_ROWS = 48;     // of a decoded tile: a multiple of every register tile's
constexpr int64_t TILE_INPUTS = 512;  // of a decoded tile
constexpr int64_t TILE_PITCH = TILE_INPUTS + 16;  // a power of two would share cache sets
constexpr int64_t MAX_TASK_BYTES = 256 << 10;     // codes that a thread takes at a time
constexpr int64_t MIN_TASK_BYTES = 16 << 10;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

#if defined(__x86_64__)
// Fetches codes into the second cache early: the first one can wait for a few lines only, which
// limits a core to 11 GB/s instead of 20 (a plain read reaches 24).
inline void prefetch_codes(const uint8_t* codes) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + 16384), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
}
#endif

// The scale unit: inputs of a chunk that share a scale. 0 where scales do not fit chunks.
int64_t scale_unit(const Matrix& weight) {
    for (int64_t unit : {128, 64, 32})
        if (weight.block % unit == 0 && weight.inputs % unit == 0) return unit;
    return 0;
}

float scale_at(const Matrix& weight, int64_t i) {
    switch (weight.scale_kind) {
    case FLOAT16:
        return half_to_float(static_cast<const uint16_t*>(weight.scales)[i]);
    case BFLOAT16:
        return bfloat16_to_float(static_cast<const uint16_t*>(weight.scales)[i]);
    case NESTED: {
        float value = weight.nested_map[static_cast<const uint8_t*>(weight.scales)[i]];
        value *= weight.nested_absmax[i / NESTED_BLOCK];
        return value + weight.offset;
    }
    default:
        return static_cast<const float*>(weight.scales)[i];
    }
}

// Copies `count` scales from index `first` on.
void copy_scales(const Matrix& weight, int64_t first, int64_t count, float* out) {
    if (weight.scale_kind == FLOAT32) {
        memcpy(out, static_cast<const float*>(weight.scales) + first, sizeof(float) * count);
    } else if (weight.scale_kind == NESTED) {
        const uint8_t* codes = static_cast<const uint8_t*>(weight.scales) + first;
        for (int64_t i = 0; i < count;) {
            const int64_t left = NESTED_BLOCK - (first + i) % NESTED_BLOCK;
            const int64_t end = i + left < count ? i + left : count;
            const float absmax = weight.nested_absmax[(first + i) / NESTED_BLOCK];
            for (; i < end; i++) out[i] = weight.nested_map[codes[i]] * absmax + weight.offset;
        }
    } else if (weight.scale_kind == BFLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(weight.scales) + first;
        for (int64_t i = 0; i < count; i++) out[i] = bfloat16_to_float(bits[i]);
    } else {
        const uint16_t* bits = static_cast<const uint16_t*>(weight.scales) + first;
        for (int64_t i = 0; i < count; i++) out[i] = half_to_float(bits[i]);
    }
}

#if defined(__x86_64__)
QMIX_AVX2 void copy_half_scales(const uint16_t* bits, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
    }
    for (; i < count; i++) out[i] = half_to_float(bits[i]);
}
#endif

// Writes the scales, and the zeros if `zeros` is not null, of units [first, last) of a row, then
// 0.0 up to `padded` units.
template <class Kernels>
void read_scales(const Matrix& weight, int64_t unit, int64_t row, int64_t first, int64_t last,
                 int64_t padded, float* scales, float* zeros) {
    const int64_t count = last - first, element = row * weight.inputs + first * unit;
    int64_t index = element / weight.block;
    if (unit == weight.block) {
#if defined(__x86_64__)
        if (weight.scale_kind == FLOAT16 && Kernels::VECTORS)
            copy_half_scales(static_cast<const uint16_t*>(weight.scales) + index, count, scales);
        else
#endif
            copy_scales(weight, index, count, scales);
        if (zeros)
            for (int64_t i = 0; i < count; i++) zeros[i] = weight.zeros[index + i];
    } else {
        for (int64_t i = 0, used = element % weight.block; i < count; index++, used = 0) {
            const float scale = scale_at(weight, index);
            const float zero = weight.zeros ? weight.zeros[index] : 0;
            for (; used < weight.block && i < count; used += unit, i++) {
                scales[i] = scale;
                if (zeros) zeros[i] = zero;
            }
        }
    }
    for (int64_t i = count; i < padded; i++) scales[i] = 0;
    if (zeros)
        for (int64_t i = count; i < padded; i++) zeros[i] = 0;
}

// Fetches the scales of a row that comes soon into the first cache.
inline void prefetch_scales(const Matrix& weight, int64_t row) {
    const int64_t bytes = weight.scale_kind == FLOAT32 ? 4 : weight.scale_kind == NESTED ? 1 : 2;
    const char* scales =
        static_cast<const char*>(weight.scales) + row * weight.inputs / weight.block * bytes;
    for (int64_t i = 0; i < weight.inputs / weight.block * bytes; i += 64)
        __builtin_prefetch(scales + i);
    if (weight.zeros)
        for (int64_t i = 0; i < weight.inputs / weight.block; i += 64)
            __builtin_prefetch(weight.zeros + row * weight.inputs / weight.block + i);
}

// The input of a chunk that stands at an arranged place.
int64_t input_at(int64_t place, int32_t high_first) {
    int64_t p = place / 16, word = place % 16;
    return 8 * word + (high_first ? p ^ 1 : p);
}

// The memory of one thread.
struct Scratch {
    float* scales;  // of ROWS_AT_ONCE rows, `pitch` apart, with room for a vector behind the last
    float* zeros;   // as many
    float* tile;    // [TILE_ROWS, TILE_PITCH]
    float* sums;    // [panels of MAX_TOKENS][TILE_ROWS][lanes]
    int64_t pitch;
};

// Decodes a chunk whose scales do not fit it, or the last one of a matrix whose rows share bytes.
void decode_chunk_slowly(const Matrix& weight, int64_t row, int64_t chunk, float* out) {
    for (int64_t place = 0; place < CHUNK; place++) {
        int64_t input = chunk * CHUNK + input_at(place, weight.high_first);
        int64_t element = row * weight.inputs + input;
        out[place] = 0;
        if (input >= weight.inputs) continue;
        int shift = (element % 2 == 0) == bool(weight.high_first) ? 4 : 0;
        float value = weight.table[weight.codes[element / 2] >> shift & 15];
        if (weight.zeros) value -= weight.zeros[element / weight.block];
        out[place] = value * scale_at(weight, element / weight.block);
    }
}

}  // namespace
