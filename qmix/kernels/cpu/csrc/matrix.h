// A 4-bit matrix as its weight stores it: where codes and scales lie, and in which order a kernel reads them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define QMIX_AVX2 __attribute__((target("avx2,fma,f16c")))
#define QMIX_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define QMIX_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif

extern "C" {

enum ScaleKind : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, NESTED = 3 };
enum Path : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, VNNI = 3 };

struct Matrix {                 // [rows, inputs], packed two codes a byte, rows one after another
    const uint8_t* codes;
    const void* scales;         // one for every `block` consecutive elements
    const uint8_t* zeros;       // as many, or null
    const float* table;         // [16]
    const float* nested_absmax; // NESTED: map[codes[i]] * absmax[i / 256] + offset
    const float* nested_map;
    int64_t rows, inputs, block;
    float offset;
    int32_t scale_kind;
    int32_t high_first;         // the first of a byte's two codes is its high nibble
};

struct Matmul {                // y [tokens, rows] = x [tokens, inputs] W^T, float32, contiguous
    Matrix weight;
    const float* x;
    float* y;
    int64_t tokens;
    int32_t rounded;            // 16-bit integers may stand for the inputs and the table
};

}  // extern "C"

namespace {

// One register of 64 bytes, or as many as a processor needs for them.
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int64_t CHUNK = 128;       // inputs
constexpr int64_t BYTES = CHUNK / 2;
constexpr int64_t NESTED_BLOCK = 256;
constexpr int64_t DIRECT = 4;        // most tokens that are multiplied while codes are looked up
constexpr int64_t ROUNDED = 16;      // tokens of a rounded product at a time: their inputs stay in the second cache
constexpr int64_t ABREAST = 4;       // rows of a rounded product of one token that are multiplied at a time
constexpr int64_t TOKENS = 512;      // tokens that are arranged at a time
constexpr int64_t WIDE = 32;         // tokens of a panel, lanes of the largest register tile
constexpr int64_t ROWS = 48;         // rows of a decoded tile: a multiple of every register tile's
constexpr int64_t DEPTH = 512;       // inputs of a decoded tile
constexpr int64_t PITCH = DEPTH + 16;  // its rows' distance: a power of two would share cache sets
constexpr int64_t MOST_BYTES = 256 << 10, LEAST_BYTES = 16 << 10;  // codes that a thread takes at a time

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

#if defined(__x86_64__)
// Codes on their way: to the second cache early, or the few lines that the first one can wait for at a
// time are the bound (11 GB/s on one core instead of 20, of 24 that a plain read reaches).
inline void ahead(const uint8_t* codes) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + 16384), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
}
#endif

// Inputs of one scale within a chunk: the kernels' unit, or 0 where scales do not fit chunks.
int64_t unit(const Matrix& m) {
    for (int64_t size : {128, 64, 32})
        if (m.block % size == 0 && m.inputs % size == 0) return size;
    return 0;
}

float half(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff, word;
    float value;
    if (rest >= 0x7c00) {
        word = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        word = sign | ((rest << 13) + (112u << 23));
    } else {
        value = float(rest) * 0x1p-24f;
        memcpy(&word, &value, 4);
        word |= sign;
    }
    memcpy(&value, &word, 4);
    return value;
}

float scale(const Matrix& m, int64_t i) {
    switch (m.scale_kind) {
    case FLOAT16: return half(static_cast<const uint16_t*>(m.scales)[i]);
    case BFLOAT16: {
        uint32_t word = uint32_t(static_cast<const uint16_t*>(m.scales)[i]) << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
    case NESTED: {
        float value = m.nested_map[static_cast<const uint8_t*>(m.scales)[i]];
        value *= m.nested_absmax[i / NESTED_BLOCK];
        return value + m.offset;
    }
    default: return static_cast<const float*>(m.scales)[i];
    }
}

// `count` scales from the `at`-th on.
void copy_scales(const Matrix& m, int64_t at, int64_t count, float* out) {
    if (m.scale_kind == FLOAT32) {
        memcpy(out, static_cast<const float*>(m.scales) + at, sizeof(float) * count);
    } else if (m.scale_kind == NESTED) {
        const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + at;
        for (int64_t i = 0; i < count;) {
            const int64_t left = NESTED_BLOCK - (at + i) % NESTED_BLOCK, end = i + left < count ? i + left : count;
            const float absmax = m.nested_absmax[(at + i) / NESTED_BLOCK];
            for (; i < end; i++) out[i] = m.nested_map[codes[i]] * absmax + m.offset;
        }
    } else if (m.scale_kind == BFLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(m.scales) + at;
        uint32_t* words = reinterpret_cast<uint32_t*>(out);
        for (int64_t i = 0; i < count; i++) words[i] = uint32_t(bits[i]) << 16;
    } else {
        const uint16_t* bits = static_cast<const uint16_t*>(m.scales) + at;
        for (int64_t i = 0; i < count; i++) out[i] = half(bits[i]);
    }
}

#if defined(__x86_64__)
QMIX_AVX2 void copy_halves(const uint16_t* bits, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i))));
    for (; i < count; i++) out[i] = half(bits[i]);
}
#endif

// Scales and zeros of units [first, last) of a row, and zeros of the float kind up to `padded` units.
template <class Kernels>
void read_scales(const Matrix& m, int64_t size, int64_t row, int64_t first, int64_t last, int64_t padded,
                 float* scales, float* zeros) {
    const int64_t count = last - first, element = row * m.inputs + first * size;
    int64_t at = element / m.block;
    if (size == m.block) {
#if defined(__x86_64__)
        if (m.scale_kind == FLOAT16 && Kernels::VECTORS)
            copy_halves(static_cast<const uint16_t*>(m.scales) + at, count, scales);
        else
#endif
            copy_scales(m, at, count, scales);
        if (zeros)
            for (int64_t i = 0; i < count; i++) zeros[i] = m.zeros[at + i];
    } else {
        for (int64_t i = 0, used = element % m.block; i < count; at++, used = 0) {
            const float value = scale(m, at), zero = m.zeros ? m.zeros[at] : 0;
            for (; used < m.block && i < count; used += size, i++) {
                scales[i] = value;
                if (zeros) zeros[i] = zero;
            }
        }
    }
    for (int64_t i = count; i < padded; i++) scales[i] = 0;
    if (zeros)
        for (int64_t i = count; i < padded; i++) zeros[i] = 0;
}

// The scales of a row that comes soon, on their way to the first cache.
inline void scales_ahead(const Matrix& m, int64_t row) {
    const int64_t size = m.scale_kind == FLOAT32 ? 4 : m.scale_kind == NESTED ? 1 : 2;
    const char* scales = static_cast<const char*>(m.scales) + row * m.inputs / m.block * size;
    for (int64_t i = 0; i < m.inputs / m.block * size; i += 64) __builtin_prefetch(scales + i);
    if (m.zeros)
        for (int64_t i = 0; i < m.inputs / m.block; i += 64) __builtin_prefetch(m.zeros + row * m.inputs / m.block + i);
}

// Which input of a chunk stands at each arranged place.
int64_t input_at(int64_t place, int32_t high_first) {
    int64_t p = place / 16, word = place % 16;
    return 8 * word + (high_first ? p ^ 1 : p);
}

// The table as integers: `values[code] / by`. Eight products of a lane's sum stay below 2^31.
struct Integers {
    int16_t values[32];  // twice the sixteen: a fifth bit of an index is another code's
    float by, largest_input;
    bool linear;         // code + values[0]; the inputs are sums of two signed bytes then

    explicit Integers(const float* table) : by(1), largest_input(32767), linear(true) {
        float largest = 0;
        bool whole = true;
        for (int i = 0; i < 16; i++) {
            const float size = table[i] < 0 ? -table[i] : table[i];
            largest = size > largest ? size : largest;
            whole = whole && table[i] == float(int(table[i]));
            linear = linear && table[i] == table[0] + float(i);
        }
        linear = linear && whole && largest <= 16;
        if (linear) {
            largest_input = 127 * 256 + 127;
        } else if (!whole || largest > 16) {
            largest_input = 16383;
            by = largest > 0 ? 16383 / largest : 1;
        }
        for (int i = 0; i < 32; i++) values[i] = int16_t(__builtin_rintf(table[i % 16] * by));
    }
};

// Tokens of a rounded product.
struct Inputs {
    const int16_t* x;     // [tokens][chunks * CHUNK], in a rounded product's order
    const float* scales;  // [tokens][chunks]
    const float* totals;  // linear codes: [tokens][chunks][4], of the inputs of a scale
    int64_t tokens;
};

// e^x, in words that a compiler makes vectors of: 2^n times a polynomial in the rest (Cephes' expf), within 2
// of the last places; e^-87 of anything below.
inline __attribute__((always_inline)) float exponential(float x) {
    x = x > -87.f ? x : -87.f;
    x = x < 89.f ? x : 89.f;  // there the power is infinite
    const float n = __builtin_rintf(x * 1.44269504f), rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

// silu(gate) * up: a gate so low that its exponential is infinite is closed.
inline __attribute__((always_inline)) void gated_values(const float* gate, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

// One thread's memory.
struct Scratch {
    float* scales;  // of ABREAST rows, `pitch` apart, and room for a vector's load behind the last
    float* zeros;   // as many
    float* tile;    // [ROWS, PITCH]
    float* sums;    // [panels of TOKENS][ROWS][lanes]
    int64_t pitch;
};

// A chunk whose scales do not fit it, or the last of a matrix whose rows share bytes.
void look_up_slowly(const Matrix& m, int64_t row, int64_t chunk, float* out) {
    for (int64_t place = 0; place < CHUNK; place++) {
        int64_t input = chunk * CHUNK + input_at(place, m.high_first), element = row * m.inputs + input;
        out[place] = 0;
        if (input >= m.inputs) continue;
        int shift = (element % 2 == 0) == bool(m.high_first) ? 4 : 0;
        float value = m.table[m.codes[element / 2] >> shift & 15];
        if (m.zeros) value -= m.zeros[element / m.block];
        out[place] = value * scale(m, element / m.block);
    }
}

}  // namespace
