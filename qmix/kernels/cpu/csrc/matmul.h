// Matmuls with matrices in codes, several at once, on the kernels of one instruction set.
//
// Few tokens are multiplied as the codes are looked up, in registers: these matmuls wait for
// memory. More tokens share tiles of the weight that are decoded into the cache.
//
// Where the caller allows `quantize_activations` (its inputs and outputs have 16 bits) and the
// processor has the instructions, both are done in 16-bit integers instead: inputs with a scale for
// each chunk (rows) or unit (tiles), the table with one scale, integers as they are; sums are
// exact. The result errs by 0.01 % (rounding an output to bfloat16: 0.1 %). A processor with AMX
// multiplies tiles in bfloat16 instead: bfloat16_tiles.h.

#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "int16.h"
#include "matrix.h"
#include "structs.h"
#include "threads.h"

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

// Up to how many tokens each is computed as if it were alone: as long as they are taken one by one.
template <class Kernels>
int64_t tokens_as_alone(const Matrix& weight) {
    const int64_t unit = scale_unit(weight);
    if constexpr (Kernels::INT16)
        if (unit && Kernels::takes(weight, IntegerTable(weight), unit))
            return Kernels::max_int16_tokens(weight);
    return 1;
}

// The bytes of codes that a thread takes at a time from all matrices together: a few times as many
// tasks as threads, because every task moves the loop's counter from one core to another.
int64_t balanced_task_bytes(const Matmul* matmuls, int64_t count, int threads) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; i++)
        bytes += matmuls[i].weight.rows * row_bytes(matmuls[i].weight);
    bytes /= 8 * threads;
    return bytes > MAX_TASK_BYTES   ? MAX_TASK_BYTES
           : bytes < MIN_TASK_BYTES ? MIN_TASK_BYTES
                                    : bytes;
}

// The rows of a tile, a multiple of what the register tiles take: fewer than TILE_ROWS, for which
// inputs are loaded more often, where that ends a tenth sooner.
int64_t balanced_tile_rows(const Matmul* matmuls, int64_t count, int threads) {
    int64_t best = TILE_ROWS, least = 0;
    for (int64_t rows = TILE_ROWS; rows; rows -= 12) {
        int64_t tiles = 0;
        for (int64_t i = 0; i < count; i++)
            tiles += round_up(matmuls[i].tokens, MAX_TOKENS) / MAX_TOKENS *
                     (round_up(matmuls[i].weight.rows, rows) / rows);
        const int64_t longest = round_up(tiles, threads) / threads * rows;
        if (least && longest * 10 > least * 9) continue;
        best = rows, least = longest;
    }
    return best;
}

template <class Kernels>
std::vector<MatmulPass> plan_passes(const Matmul* matmuls, int64_t count, int threads) {
    const int64_t panel_tokens = Kernels::lanes(MAX_TOKENS);
    const int64_t task_bytes = balanced_task_bytes(matmuls, count, threads);
    const int64_t tile_rows = balanced_tile_rows(matmuls, count, threads);
    std::vector<MatmulPass> passes;
    for (int64_t i = 0; i < count; i++) {
        const Matrix& weight = matmuls[i].weight;
        int64_t unit = scale_unit(weight);
        int32_t most_value = 0;
        bool int16 = false, folded = false, tiles = matmuls[i].tokens > DIRECT_TOKENS;
        if constexpr (Kernels::INT16)
            if (matmuls[i].quantize_activations && unit &&
                matmuls[i].tokens <= Kernels::max_int16_tokens(weight)) {
                int16 = Kernels::takes(weight, IntegerTable(weight), unit);
                tiles = tiles && !int16;
            }
        if constexpr (Kernels::INT16_TILES)
            if (matmuls[i].quantize_activations &&
                matmuls[i].tokens > Kernels::max_int16_tokens(weight)) {
                const IntegerTable table(weight, TILE_VALUE);
                int16 = Kernels::takes_tiles(weight, table, unit);
                folded = int16 && Kernels::folds_scales(weight, table);
                most_value = Kernels::largest_value(weight, table);
                if (folded) most_value *= int32_t(Kernels::largest_scale(weight.scales));
                if (folded || (int16 && !table.linear && unit > Kernels::TILE_UNIT))
                    unit = Kernels::TILE_UNIT;
            }
        const bool bfloat16 =
            Kernels::BFLOAT16_TILES && matmuls[i].quantize_activations && tiles &&
            (!int16 || matmuls[i].tokens >= Kernels::BFLOAT16_TOKENS);
        if (bfloat16) unit = scale_unit(weight), int16 = folded = false, most_value = 0;
        for (int64_t first = 0; first < matmuls[i].tokens; first += MAX_TOKENS) {
            MatmulPass pass{};
            const int64_t left = matmuls[i].tokens - first;
            pass.matmul = matmuls + i;
            pass.first_token = first;
            pass.tokens = left < MAX_TOKENS ? left : MAX_TOKENS;
            pass.unit = unit;
            pass.folded = folded, pass.most_value = most_value;
            pass.chunk = int16 && !tiles && in_planes(weight) ? 2 * CHUNK_BYTES : chunk_of(weight);
            pass.chunks = round_up(weight.inputs, pass.chunk) / pass.chunk;
            pass.int16 = int16, pass.bfloat16 = bfloat16;
            pass.padded = pass.tokens;
            if (tiles) {
                pass.padded = round_up(pass.tokens, panel_tokens);
                pass.lanes = Kernels::lanes((pass.tokens - 1) % panel_tokens + 1);
                pass.task_rows = bfloat16 ? Kernels::BFLOAT16_ROWS : tile_rows;
            } else {
                pass.task_rows =
                    round_up(task_bytes / (row_bytes(weight) + 1) + 1, ROWS_AT_ONCE);
            }
            pass.tasks = round_up(weight.rows, pass.task_rows) / pass.task_rows;
            passes.push_back(pass);
        }
    }
    return passes;
}

// The memory of a matmul, in floats, with cache lines of its own for every thread.
struct Workspace {
    int64_t arranged = 0;           // all passes'
    int64_t scales = 0, codes = 0;  // of one row
    int64_t tile = 0, sums = 0;     // of one thread
    float* memory = nullptr;

    Workspace(const std::vector<MatmulPass>& passes, int threads) {
        int64_t units = 0;
        for (const MatmulPass& pass : passes) {
            arranged += pass.padded * pass.places() + pass.int16_floats();
            const int64_t rows = pass.task_rows < TILE_ROWS ? TILE_ROWS : pass.task_rows;
            if (pass.lanes && sums < rows * pass.padded) sums = rows * pass.padded;
            if (pass.unit && units < pass.matmul->weight.inputs / pass.unit)
                units = pass.matmul->weight.inputs / pass.unit;
            const Matrix& weight = pass.matmul->weight;
            if (weight.bits == 4 || weight.bits == 8 || pass.chunk != chunk_of(weight)) continue;
            const int64_t floats = pass.places() * read_bits(weight) / 32;
            if (codes < floats) codes = floats;
        }
        arranged = round_up(arranged, 16);
        scales = round_up(units + 16, 16);
        tile = sums ? TILE_ROWS * TILE_PITCH : 0;
        void* allocated = nullptr;
        const size_t floats = size_t(arranged + threads * of_thread() + 16);
        if (posix_memalign(&allocated, 64, sizeof(float) * floats)) throw std::bad_alloc();
        memory = static_cast<float*>(allocated);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() { free(memory); }

    int64_t of_thread() const { return ROWS_AT_ONCE * (2 * scales + codes) + tile + sums; }

    Scratch scratch(int thread) const {
        float* start = memory + arranged + thread * of_thread();
        float* spread = start + 2 * ROWS_AT_ONCE * scales;
        float* tiles = spread + ROWS_AT_ONCE * codes;
        return {start,
                start + ROWS_AT_ONCE * scales,
                reinterpret_cast<uint8_t*>(spread),
                tiles,
                tiles + tile,
                scales,
                codes * int64_t(sizeof(float))};
    }
};

// Whether two passes multiply the same inputs, arranged in the same way.
bool same_inputs(const MatmulPass& one, const MatmulPass& other) {
    const Matrix &weight = one.matmul->weight, &other_weight = other.matmul->weight;
    return one.matmul->x == other.matmul->x && one.first_token == other.first_token &&
           one.tokens == other.tokens && weight.inputs == other_weight.inputs &&
           one.int16 == other.int16 && one.bfloat16 == other.bfloat16 &&
           (!one.int16 || one.unit == other.unit) &&
           one.most_value == other.most_value &&
           weight.high_first == other_weight.high_first && one.chunk == other.chunk &&
           (!one.int16 || !memcmp(weight.table, other_weight.table, 16 * sizeof(float)));
}

// A panel of a pass, or one token of a pass without panels: places [first, last) of it, which are
// few where integers are made, so that many threads share a panel.
struct Panel {
    const MatmulPass* pass;
    int64_t index, first, last;
};

// Gives every pass its place in the workspace; returns the panels that are to be arranged there.
std::vector<Panel> place_inputs(std::vector<MatmulPass>& passes, float* memory,
                                int64_t panel_tokens) {
    std::vector<Panel> panels;
    for (size_t i = 0; i < passes.size(); i++) {
        MatmulPass& pass = passes[i];
        if (i && same_inputs(passes[i - 1], pass)) {
            pass.arranged = passes[i - 1].arranged;
            pass.input_scales = passes[i - 1].input_scales;
            pass.totals = passes[i - 1].totals;
            continue;
        }
        const int64_t panel = pass.lanes ? panel_tokens : 1;
        pass.arranged = memory;
        memory += pass.padded * pass.places();
        pass.input_scales = memory;
        pass.totals = memory + pass.scales();
        memory += pass.int16_floats();
        const int64_t places = pass.places(), step = pass.int16 ? PART_INPUTS : places;
        for (int64_t p = 0; p * panel < pass.tokens; p++)
            for (int64_t at = 0; at < places; at += step)
                panels.push_back({&pass, p, at, at + step < places ? at + step : places});
    }
    return panels;
}

template <class Kernels>
void multiply_all(const Matmul* matmuls, int64_t count, int threads, Fork fork) {
    int64_t multiplications = 0;
    for (int64_t i = 0; i < count; i++)
        multiplications += matmuls[i].tokens * matmuls[i].weight.rows * matmuls[i].weight.inputs;
    if (multiplications < MIN_PARALLEL) threads = 1;
    const int64_t panel_tokens = Kernels::lanes(MAX_TOKENS);
    std::vector<MatmulPass> passes = plan_passes<Kernels>(matmuls, count, threads);
    const Workspace workspace(passes, threads);
    const std::vector<Panel> panels = place_inputs(passes, workspace.memory, panel_tokens);

    int64_t tasks = 0, arranged = 0;
    for (const MatmulPass& pass : passes) tasks += pass.tasks;
    for (const Panel& panel : panels)
        if (!panel.index && !panel.first)
            arranged += panel.pass->tokens * panel.pass->places();
    const auto arrange = [&](int64_t i, int) {
        const Panel& panel = panels[i];
        const MatmulPass& pass = *panel.pass;
        if constexpr (Kernels::INT16)
            if (pass.int16 && !pass.lanes)
                return quantize_inputs<Kernels>(pass, panel.index, panel.first, panel.last);
        if constexpr (Kernels::BFLOAT16_TILES)
            if (pass.bfloat16) return Kernels::arrange_bfloat16(pass, panel.index, panel_tokens);
        if constexpr (Kernels::INT16_TILES)
            if (pass.int16)
                return quantize_panel<Kernels>(pass, panel.index, panel_tokens, panel.first,
                                               panel.last);
        arrange_inputs<Kernels>(pass, panel.index, pass.lanes ? panel_tokens : 1);
    };
    parallel_for(int64_t(panels.size()), arranged > (1 << 14) ? threads : 1, fork, arrange);
    parallel_for(tasks, threads, fork, [&](int64_t task, int thread) {
        const MatmulPass* pass = passes.data();
        while (task >= pass->tasks) task -= pass++->tasks;
        const Scratch scratch = workspace.scratch(thread);
        if constexpr (Kernels::INT16)
            if (pass->int16 && !pass->lanes) return multiply_int16<Kernels>(*pass, task, scratch);
        if constexpr (Kernels::BFLOAT16_TILES)
            if (pass->bfloat16)
                return Kernels::multiply_bfloat16(*pass, task, panel_tokens, scratch);
        if constexpr (Kernels::INT16_TILES)
            if (pass->int16)
                return multiply_tiles(IntegerTiles<Kernels>{*pass, scratch}, task, panel_tokens);
        if (pass->lanes)
            multiply_tiles(FloatTiles<Kernels>{*pass, scratch}, task, panel_tokens);
        else
            multiply_direct<Kernels>(*pass, task, scratch);
    });
}

}  // namespace
