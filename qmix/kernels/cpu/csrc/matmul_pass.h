// One pass of a matmul: its inputs, arranged for the kernels of one instruction set, and the tasks
// into which it is cut. Knows nothing of threads, and of other matmuls.

#pragma once

#include "int16.h"
#include "matrix.h"
#include "structs.h"

namespace {

// Decodes chunks [first, last) of a row into arranged float32.
template <class Kernels>
void decode(const Matrix& weight, int64_t unit, int64_t row, int64_t first, int64_t last,
            const Scratch& scratch, float* out) {
    const int64_t chunk = chunk_of(weight);
    if (!unit) {
        for (int64_t c = first; c < last; c++)
            decode_chunk_slowly(weight, row, c, out + (c - first) * chunk);
        return;
    }
    const int64_t units = chunk / unit, row_units = weight.inputs / unit;
    const int64_t end = last * units < row_units ? last * units : row_units;
    read_scales(weight, unit, row, first * units, end, scratch.scales,
                         float_shifts(weight, scratch));
    const int64_t stop = last * chunk < weight.inputs ? last * chunk : weight.inputs;
    const uint8_t* codes = codes_of(weight, row, first * chunk, stop, scratch, 0);
    with_float_format(weight, [&](auto format) {
        const float *scales = scratch.scales, *shifts = scratch.shifts;
        for (int64_t c = first; c < last; c++, codes += CHUNK_BYTES, out += chunk) {
            const uint8_t* source = codes;
            uint8_t padded[CHUNK_BYTES] = {};
            if ((c + 1) * chunk > weight.inputs)
                source = static_cast<uint8_t*>(
                    memcpy(padded, codes, weight.inputs % chunk * read_bits(weight) / 8));
            Kernels::template decode_chunk<decltype(format)>(weight, source, unit, scales, shifts,
                                                             out);
            scales += units, shifts += units;
        }
    });
}

// Tokens [first_token, first_token + tokens) of a matmul, which are arranged together.
struct MatmulPass {
    const Matmul* matmul;
    int64_t first_token, tokens, unit;
    int64_t padded;         // tokens of whole panels
    int64_t chunk, chunks;  // inputs of a chunk, and how many hold those of a row
    int64_t lanes;  // tokens of the last panel; 0: no panels, codes are looked up as they are used
    bool int16;
    bool bfloat16;       // tiles of bfloat16, in the order of Kernels::arrange_bfloat16
    bool folded;         // tiles of integers: their values include the integers of scales
    int32_t most_value;  // of such a tile
    float* arranged;      // [tokens][places], or panels [places][lanes]
    float* input_scales;  // int16: [tokens][chunks], or panels [units][lanes]; `arranged` holds int16
                          // bfloat16: [panels], whether there are lower halves
    float* totals;        // int16: [tokens][chunks][MAX_UNITS], or panels [units][lanes]
    int64_t tasks, task_rows;

    int64_t places() const { return chunks * chunk; }
    int64_t inputs() const { return padded * places() / (int16 ? 2 : 1); }  // floats of `arranged`
    int64_t scales() const {
        return bfloat16 ? padded : !int16 ? 0 : lanes ? padded * places() / unit : tokens * chunks;
    }
    int64_t int16_floats() const {  // of scales and totals
        return round_up((lanes ? 2 : 1 + MAX_UNITS) * scales(), 16);
    }
};

template <class Kernels>
void quantize_inputs(const MatmulPass& pass, int64_t token, int64_t first, int64_t last) {
    const Matrix& weight = pass.matmul->weight;
    const IntegerTable table(weight);
    const auto quantize = pass.chunk == CHUNK_BYTES ? Kernels::template quantize_chunk<8>
                                                    : Kernels::template quantize_chunk<4>;
    const float* x = pass.matmul->x + (pass.first_token + token) * weight.inputs;
    for (int64_t c = first / pass.chunk; c < last / pass.chunk; c++) {
        const int64_t at = token * pass.chunks + c, left = weight.inputs - c * pass.chunk;
        int16_t* out = reinterpret_cast<int16_t*>(pass.arranged) + at * pass.chunk;
        pass.input_scales[at] =
            quantize(x + c * pass.chunk, left < pass.chunk ? left : pass.chunk, weight.high_first,
                     table, pass.unit, out, pass.totals + MAX_UNITS * at);
    }
}

// Places [start, last) of a panel of tokens for tiles of integers, as [places / 2][lanes][2].
template <class Kernels>
void quantize_panel(const MatmulPass& pass, int64_t panel, int64_t panel_tokens, int64_t start,
                    int64_t last) {
    const Matrix& weight = pass.matmul->weight;
    const IntegerTable table(weight, TILE_VALUE);
    const int64_t first = panel * panel_tokens, left = pass.tokens - first;
    const int64_t tokens = left < panel_tokens ? left : panel_tokens;
    const int64_t lanes = left <= panel_tokens ? pass.lanes : panel_tokens;
    const int64_t units = pass.places() / pass.unit;
    int16_t* out = reinterpret_cast<int16_t*>(pass.arranged) + first * pass.places();
    float *scales = pass.input_scales + first * units, *totals = pass.totals + first * units;
    const int64_t first_unit = start / pass.unit, count = (last - start) / pass.unit;
    const int64_t stop = last < weight.inputs ? last : weight.inputs;
    memset(out + start * lanes, 0, sizeof(int16_t) * lanes * (last - start));
    memset(scales + first_unit * lanes, 0, sizeof(float) * lanes * count);
    memset(totals + first_unit * lanes, 0, sizeof(float) * lanes * count);
    for (int64_t t = 0; t < tokens; t++) {
        const float* x = pass.matmul->x + (pass.first_token + first + t) * weight.inputs;
        for (int64_t u = first_unit; u < stop / pass.unit; u++)
            Kernels::quantize_unit(weight, table, pass.most_value, x + u * pass.unit, pass.unit, lanes,
                                   out + u * pass.unit * lanes + 2 * t, scales + u * lanes + t,
                                   totals + u * lanes + t);
    }
}

// A panel of tokens, or one token of a pass without panels, as [places][lanes].
template <class Kernels>
void arrange_inputs(const MatmulPass& pass, int64_t panel, int64_t panel_tokens) {
    const Matrix& weight = pass.matmul->weight;
    const int64_t places = pass.places(), first = panel * panel_tokens;
    const bool direct = !pass.lanes;
    const int64_t left = pass.tokens - first, tokens = left < panel_tokens ? left : panel_tokens;
    const int64_t lanes = direct ? 1 : left <= panel_tokens ? pass.lanes : panel_tokens;
    const float* x = pass.matmul->x + (pass.first_token + first) * weight.inputs;
    float* out = pass.arranged + first * places;
    for (int64_t place = 0; place < places; place++) {
        const int64_t within = place % pass.chunk;
        const int64_t input = place - within + input_at(weight, within);
        for (int64_t t = 0; t < tokens; t++)
            out[place * lanes + t] = input < weight.inputs ? x[t * weight.inputs + input] : 0;
        for (int64_t t = tokens; t < lanes; t++) out[place * lanes + t] = 0;
    }
}

template <class Kernels>
void multiply_int16(const MatmulPass& pass, int64_t task, const Scratch& scratch) {
    const Matrix& weight = pass.matmul->weight;
    const IntegerTable table(weight);
    const QuantizedInputs in{reinterpret_cast<const int16_t*>(pass.arranged), pass.input_scales,
                             pass.totals, pass.tokens};
    float* y = pass.matmul->y + pass.first_token * weight.rows;
    const int64_t first = task * pass.task_rows;
    const int64_t end = first + pass.task_rows < weight.rows ? first + pass.task_rows : weight.rows;
    const int64_t at_once = pass.tokens == 1 ? ROWS_AT_ONCE : ROWS_AT_ONCE / 2;
    const int64_t whole = end - (end - first) % at_once;
    if (pass.tokens == 1)
        Kernels::template multiply_int16<ROWS_AT_ONCE>(weight, table, pass.unit, in, first, whole,
                                                       scratch, y);
    else
        Kernels::template multiply_int16<ROWS_AT_ONCE / 2>(weight, table, pass.unit, in, first,
                                                           whole, scratch, y);
    Kernels::template multiply_int16<1>(weight, table, pass.unit, in, whole, end, scratch, y);
}

// One row whose scales are in `scratch` times the tokens of a pass without panels.
template <class Kernels>
void multiply_row(const MatmulPass& pass, int64_t row, const Scratch& scratch, float* y) {
    const Matrix& weight = pass.matmul->weight;
    const uint8_t* codes = codes_of(weight, row, 0, weight.inputs, scratch, 0);
    const float* x = pass.arranged;
    const int64_t pitch = pass.places(), unit = pass.unit;
    with_float_format(weight, [&](auto format) {
        typedef decltype(format) Row;
        if constexpr (!Kernels::VECTORS) {
            Kernels::template multiply_row<Row>(weight, codes, x, pitch, pass.tokens, row, unit,
                                                scratch, y);
        } else {
            const auto multiply = [&](auto kernel) {
                kernel(weight, codes, x, pitch, row, unit, scratch, y);
            };
            switch (pass.tokens) {
            case 1:
                return multiply(Kernels::template multiply_row<Row, 1>);
            case 2:
                return multiply(Kernels::template multiply_row<Row, 2>);
            case 3:
                return multiply(Kernels::template multiply_row<Row, 3>);
            default:
                return multiply(Kernels::template multiply_row<Row, 4>);
            }
        }
    });
}

template <class Kernels>
void multiply_direct(const MatmulPass& pass, int64_t task, const Scratch& scratch) {
    const Matrix& weight = pass.matmul->weight;
    const int64_t places = pass.places(), last = (task + 1) * pass.task_rows;
    const int64_t end = last < weight.rows ? last : weight.rows;
    float* y = pass.matmul->y + pass.first_token * weight.rows;
    for (int64_t row = task * pass.task_rows; row < end; row++) {
        if (pass.unit) {
            const int64_t units = weight.inputs / pass.unit;
            prefetch_scales(weight, row + 8);
            read_scales(weight, pass.unit, row, 0, units, scratch.scales,
                                 float_shifts(weight, scratch));
            multiply_row<Kernels>(pass, row, scratch, y);
            continue;
        }
        float sums[DIRECT_TOKENS] = {}, values[TILE_INPUTS];
        for (int64_t c = 0; c < pass.chunks; c++) {
            decode_chunk_slowly(weight, row, c, values);
            for (int64_t t = 0; t < pass.tokens; t++) {
                const float* x = pass.arranged + t * places + c * pass.chunk;
                for (int64_t i = 0; i < pass.chunk; i++) sums[t] += values[i] * x[i];
            }
        }
        for (int64_t t = 0; t < pass.tokens; t++) y[t * weight.rows + row] = sums[t];
    }
}

// Tiles of a weight in float32.
template <class Kernels>
struct FloatTiles {
    const MatmulPass& pass;
    const Scratch& scratch;

    void decode_rows(int64_t first, int64_t rows, int64_t at, int64_t depth) const {
        for (int64_t r = 0; r < rows; r++)
            decode<Kernels>(pass.matmul->weight, pass.unit, first + r, at / pass.chunk,
                            (at + depth) / pass.chunk, scratch, scratch.tile + r * TILE_PITCH);
    }

    // Adds the products of `depth` places from `at` on to the sums of the panel of token `t`.
    void multiply(int64_t rows, int64_t at, int64_t depth, int64_t t, int64_t lanes) const {
        Kernels::multiply_tile(scratch.tile, rows, depth,
                               pass.arranged + t * pass.places() + at * lanes, lanes,
                               scratch.sums + t * TILE_ROWS);
    }
};

// The same in 16-bit integers.
template <class Kernels>
struct IntegerTiles {
    const MatmulPass& pass;
    const Scratch& scratch;

    void decode_rows(int64_t first, int64_t rows, int64_t at, int64_t depth) const {
        const Matrix& weight = pass.matmul->weight;
        const typename Kernels::Decoder decoder{IntegerTable(weight, TILE_VALUE)};
        for (int64_t r = 0; r < rows; r++)
            Kernels::decode_row(weight, decoder, pass.unit, pass.folded, first + r, at, at + depth,
                                scratch, r);
    }

    void multiply(int64_t rows, int64_t at, int64_t depth, int64_t t, int64_t lanes) const {
        const int64_t unit = at / pass.unit * lanes, first = t * pass.places() / pass.unit + unit;
        const int16_t* x = reinterpret_cast<const int16_t*>(pass.arranged);
        Kernels::multiply_int16_tile(typename Kernels::Tile(scratch.tile), rows, pass.unit,
                                     depth / pass.unit,
                                     {x + t * pass.places() + at * lanes, pass.input_scales + first,
                                      pass.totals + first, lanes},
                                     shift_of(pass.matmul->weight) != NONE,
                                     scratch.sums + t * TILE_ROWS);
    }
};

template <class Tiles>
void multiply_tiles(const Tiles& tiles, int64_t task, int64_t panel_tokens) {
    const MatmulPass& pass = tiles.pass;
    const Scratch& scratch = tiles.scratch;
    const Matrix& weight = pass.matmul->weight;
    const int64_t first = task * pass.task_rows;
    const int64_t left = weight.rows - first, rows = left < pass.task_rows ? left : pass.task_rows;
    const int64_t padded = round_up(rows, 12), places = pass.places();
    memset(scratch.sums, 0, sizeof(float) * TILE_ROWS * pass.padded);
    if (padded > rows || places > weight.inputs)
        memset(scratch.tile, 0, sizeof(float) * TILE_ROWS * TILE_PITCH);
    for (int64_t at = 0; at < places; at += TILE_INPUTS) {
        const int64_t depth = places - at < TILE_INPUTS ? places - at : TILE_INPUTS;
        tiles.decode_rows(first, rows, at, depth);
        for (int64_t t = 0; t < pass.tokens; t += panel_tokens)
            tiles.multiply(padded, at, depth, t,
                           t + panel_tokens >= pass.tokens ? pass.lanes : panel_tokens);
    }
    float* y = pass.matmul->y + pass.first_token * weight.rows + first;
    for (int64_t t = 0; t < pass.tokens; t++) {
        const int64_t panel = t / panel_tokens * panel_tokens;
        const int64_t lanes = panel + panel_tokens >= pass.tokens ? pass.lanes : panel_tokens;
        const float* sums = scratch.sums + panel * TILE_ROWS + t % panel_tokens;
        for (int64_t r = 0; r < rows; r++) y[t * weight.rows + r] = sums[r * lanes];
    }
}

}  // namespace
