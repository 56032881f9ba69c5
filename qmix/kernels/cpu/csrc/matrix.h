// Reading a matrix in codes: its groups, its codes, and the order that the matmuls want inputs in.
//
// A chunk is 64 bytes of a row: 16 little-endian words of 8 codes of 4 bits, or of 4 codes of 8
// bits. Shifted right by p codes, the low bits of the words are 16 codes, one in each lane of a
// register. Inputs are therefore arranged in the order [p][word] within a chunk, and codes never
// are. Codes of 2 and of 3 bits are spread to 4 when a row is read, those of 5 and 6 to 8, except
// where rows are multiplied in integers: there a chunk of them is 128 codes, as of 4 bits.

#pragma once

#include "code_bits.h"
#include "float_math.h"
#include "group_values.h"
#include "structs.h"

namespace {

constexpr int64_t CHUNK_BYTES = 64;
constexpr int64_t MAX_UNITS = 8;      // of a chunk
constexpr int64_t DIRECT_TOKENS = 4;  // at most this many are multiplied while codes are looked up
constexpr int64_t ROWS_AT_ONCE = 4;   // of an int16 matmul of one token
constexpr int64_t MAX_TOKENS = 512;   // arranged at a time
constexpr int64_t PANEL_TOKENS = 32;  // at most, in the panels of a tiled matmul
constexpr int64_t TILE_ROWS = 48;     // of a decoded tile: a multiple of every register tile's
constexpr int64_t TILE_INPUTS = 512;  // of a decoded tile
constexpr int64_t TILE_PITCH = TILE_INPUTS + 16;  // a power of two would share cache sets
constexpr int64_t PART_INPUTS = 1024;  // that a thread makes integers of at a time
constexpr int64_t MAX_TASK_BYTES = 256 << 10;     // codes that a thread takes at a time
constexpr int64_t MIN_TASK_BYTES = 16 << 10;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What is done to the value of a code before or after it is scaled.
enum Shift { NONE, ZEROS, BIASES };

Shift shift_of(const Matrix& weight) {
    return weight.biases.values ? BIASES : weight.zeros.values ? ZEROS : NONE;
}

// How the codes of a matrix are read: what the kernels are compiled for.
template <int CODE_BITS, Shift CODE_SHIFT>
struct Format {
    static constexpr int BITS = CODE_BITS;             // 4, 5, 6 or 8
    static constexpr int WORD = BITS == 8 ? 4 : 8;     // codes of a word
    static constexpr int UPPER_BITS = BITS == 5 || BITS == 6 ? BITS - 4 : 0;
    static constexpr int64_t CHUNK = 16 * WORD;  // inputs
    static constexpr Shift SHIFT = CODE_SHIFT;
};

// Whether codes stand in two planes, and the bits of the upper one.
bool in_planes(const Matrix& weight) { return weight.bits == 5 || weight.bits == 6; }
int64_t upper_bits(const Matrix& weight) { return weight.bits - 4; }

// The bits of a code as the kernels read it, and the inputs of a chunk.
int64_t read_bits(const Matrix& weight) { return weight.bits > 4 ? 8 : 4; }
int64_t chunk_of(const Matrix& weight) { return CHUNK_BYTES * 8 / read_bits(weight); }

// Calls `body` with the format of a matrix for kernels of floats, to which the zero of a code of 8
// bits is always a shift.
template <class Body>
void with_float_format(const Matrix& weight, const Body& body) {
    const Shift shift = shift_of(weight);
    if (read_bits(weight) == 8)
        return shift == BIASES ? body(Format<8, BIASES>{}) : body(Format<8, ZEROS>{});
    if (shift == NONE) return body(Format<4, NONE>{});
    shift == BIASES ? body(Format<4, BIASES>{}) : body(Format<4, ZEROS>{});
}

// The same for kernels of integers, which take codes in planes without zeros only.
template <class Body>
void with_format(const Matrix& weight, const Body& body) {
    if (weight.bits == 5)
        return shift_of(weight) == NONE ? body(Format<5, NONE>{}) : body(Format<5, BIASES>{});
    if (weight.bits == 6)
        return shift_of(weight) == NONE ? body(Format<6, NONE>{}) : body(Format<6, BIASES>{});
    if (weight.bits == 8 && shift_of(weight) == NONE) return body(Format<8, NONE>{});
    with_float_format(weight, body);
}

int64_t row_bytes(const Matrix& weight) { return weight.inputs * weight.bits / 8; }

// Fetches codes into the second cache early: the first one can wait for a few lines only, which
// limits a core to 11 GB/s instead of 20 (a plain read reaches 24).
inline void prefetch_codes(const uint8_t* codes) {
    __builtin_prefetch(codes + 16384, 0, 2);
    __builtin_prefetch(codes + 1024, 0, 3);
}

// The unit: inputs of a chunk that share a scale. 0 where groups do not fit chunks.
int64_t scale_unit(const Matrix& weight) {
    for (int64_t unit : {128, 64, 32, 16})
        if (unit <= chunk_of(weight) && weight.block % unit == 0 && weight.inputs % unit == 0)
            return unit;
    return 0;
}

// Reads the values of `count` units from element `element` on, the first of group `group`, with
// 0.0 behind them.
inline void read_units(const Matrix& weight, const GroupValues& array, int64_t unit, int64_t element,
                int64_t group, int64_t count, float* out) {
    if (unit == weight.block) {
        copy_values(array, group, count, out);
    } else {
        const int64_t groups = (element + count * unit - 1) / weight.block + 1 - group;
        const float* values = out + count - groups;  // none is overwritten before it is read
        copy_values(array, group, groups, out + count - groups);
        for (int64_t i = 0, used = element - group * weight.block; i < count; used = 0) {
            const float value = *values++;
            for (; used < weight.block && i < count; used += unit) out[i++] = value;
        }
    }
    memset(out + count, 0, sizeof(float) * MAX_UNITS);
}

// Writes the scales of units [first, last) of a row, and their zeros or biases if `shifts` is not
// null; MAX_UNITS of 0.0 follow. Without zeros the shift is that of a code which stands for 0.
inline void read_scales(const Matrix& weight, int64_t unit, int64_t row, int64_t first, int64_t last,
                 float* scales, float* shifts) {
    const int64_t count = last - first, element = row * weight.inputs + first * unit;
    const int64_t group = element / weight.block;
    read_units(weight, weight.scales, unit, element, group, count, scales);
    if (!shifts) return;
    const GroupValues& array = weight.biases.values ? weight.biases : weight.zeros;
    if (array.values)
        read_units(weight, array, unit, element, group, count, shifts);
    else
        for (int64_t i = 0; i < count + MAX_UNITS; i++) shifts[i] = -weight.table[0];
}

// Fetches the scales of a row that comes soon into the first cache, where rows have groups of
// their own.
inline void prefetch_scales(const Matrix& weight, int64_t row) {
    const int64_t count = weight.inputs / weight.block, first = row * count;
    prefetch_values(weight.scales, first, count);
    prefetch_values(weight.zeros, first, count);
    prefetch_values(weight.biases, first, count);
}

// The input of a chunk that stands at an arranged place.
int64_t input_at(const Matrix& weight, int64_t place) {
    const int64_t p = place / 16, word = place % 16;
    return 32 / read_bits(weight) * word + (weight.high_first ? p ^ 1 : p);
}

// The memory of one thread.
struct Scratch {
    float* scales;   // of ROWS_AT_ONCE rows, `pitch` apart, with room for a vector behind the last
    float* shifts;   // as many
    uint8_t* codes;  // of ROWS_AT_ONCE rows, `code_pitch` apart, if any are spread
    float* tile;     // [TILE_ROWS, TILE_PITCH]
    float* sums;     // [panels of MAX_TOKENS][TILE_ROWS][lanes]
    int64_t pitch, code_pitch;
};

// Where kernels of floats want the shifts of a row; null if they want none.
float* float_shifts(const Matrix& weight, const Scratch& scratch) {
    return shift_of(weight) == NONE && weight.bits <= 4 ? nullptr : scratch.shifts;
}

// The upper bits of the codes of a row from input `first` on, a multiple of eight.
inline const uint8_t* upper_of(const Matrix& weight, int64_t row, int64_t first) {
    return weight.codes + row * row_bytes(weight) + weight.inputs / 2 +
           first * upper_bits(weight) / 8;
}

// The codes of inputs [first, last) of a row, in 4 or 8 bits: where the weight has them, or in row
// `slot` of the scratch.
inline const uint8_t* codes_of(const Matrix& weight, int64_t row, int64_t first, int64_t last,
                               const Scratch& scratch, int64_t slot) {
    const uint8_t* start = weight.codes + row * row_bytes(weight);
    const uint8_t* codes = start + first * weight.bits / 8;
    if (weight.bits == 4 || weight.bits == 8) return codes;
    uint8_t* out = scratch.codes + slot * scratch.code_pitch;
    if (in_planes(weight))
        join_planes(start + first / 2, upper_of(weight, row, first), upper_bits(weight),
                    last - first, out);
    else
        spread_codes(codes, weight.bits, last - first, out);
    return out;
}

uint32_t code_at(const Matrix& weight, int64_t element) {
    if (in_planes(weight)) {
        uint8_t codes[8];
        const int64_t row = element / weight.inputs, first = element % weight.inputs / 8 * 8;
        const uint8_t* lower = weight.codes + row * row_bytes(weight) + first / 2;
        join_planes(lower, upper_of(weight, row, first), upper_bits(weight), 8, codes);
        return codes[element % weight.inputs % 8];
    }
    const int64_t bit = element * weight.bits;
    const int64_t shift = weight.high_first ? 4 - bit % 8 : bit % 8;
    uint32_t code = weight.codes[bit / 8] >> shift;
    if (shift + weight.bits > 8) code |= uint32_t(weight.codes[bit / 8 + 1]) << (8 - shift);
    return code & ((1u << weight.bits) - 1);
}

// One element, wherever its code and its group begin.
float value_at(const Matrix& weight, int64_t element) {
    const int64_t group = element / weight.block;
    const uint32_t code = code_at(weight, element);
    const float value = weight.bits > 4 ? weight.table[0] + float(code) : weight.table[code];
    float scale, other;
    copy_values(weight.scales, group, 1, &scale);
    if (weight.biases.values) {
        copy_values(weight.biases, group, 1, &other);
        return value * scale + other;
    }
    if (!weight.zeros.values) return value * scale;
    copy_values(weight.zeros, group, 1, &other);
    return (value - other) * scale;
}

// Decodes a chunk whose groups do not fit it, or the last one of a matrix whose rows share bytes.
void decode_chunk_slowly(const Matrix& weight, int64_t row, int64_t chunk, float* out) {
    const int64_t count = chunk_of(weight);
    for (int64_t place = 0; place < count; place++) {
        const int64_t input = chunk * count + input_at(weight, place);
        out[place] = input < weight.inputs ? value_at(weight, row * weight.inputs + input) : 0;
    }
}

}  // namespace
