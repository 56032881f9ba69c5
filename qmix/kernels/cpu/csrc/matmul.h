// Matmuls with 4-bit matrices, several at once, on the kernels of one instruction set.
//
// Few tokens are multiplied as the codes are looked up, in registers: these matmuls wait for
// memory. More tokens share tiles of the weight that are decoded into the cache.
//
// Where the caller allows `quantize_activations` (its inputs and outputs have 16 bits) and the
// processor has AVX-512 VNNI, tokens are multiplied as 16-bit integers instead: inputs with a scale
// for each chunk, the table with one scale, integer tables as they are; sums are exact. The result
// errs by 0.007 % (rounding an output to bfloat16: 0.1 %). One token takes a third fewer
// instructions than in float32, a prompt of 512 tokens 0.55 of the time.

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
    if (!unit) {
        for (int64_t c = first; c < last; c++)
            decode_chunk_slowly(weight, row, c, out + (c - first) * CHUNK);
        return;
    }
    const int64_t units = CHUNK / unit, row_units = weight.inputs / unit;
    const int64_t end = last * units < row_units ? last * units : row_units;
    read_scales<Kernels>(weight, unit, row, first * units, end, (last - first) * units + 4,
                         scratch.scales, weight.zeros ? scratch.zeros : nullptr);
    const uint8_t* codes = weight.codes + row * (weight.inputs / 2);
    for (int64_t c = first; c < last; c++) {
        const uint8_t* source = codes + c * CHUNK_BYTES;
        uint8_t padded[CHUNK_BYTES] = {};
        if ((c + 1) * CHUNK > weight.inputs)
            source = static_cast<uint8_t*>(memcpy(padded, source, weight.inputs % CHUNK / 2));
        int64_t at = (c - first) * units;
        Kernels::decode_chunk(weight, source, unit, scratch.scales + at,
                              weight.zeros ? scratch.zeros + at : nullptr,
                              out + (c - first) * CHUNK);
    }
}

// Tokens [first_token, first_token + tokens) of a matmul, which are arranged together.
struct MatmulPass {
    const Matmul* matmul;
    int64_t first_token, tokens, unit, chunks;
    int64_t lanes;  // tokens of the last panel; 0: no panels, codes are looked up as they are used
    bool int16;
    float* arranged;      // [tokens][chunks * CHUNK], or panels [places][lanes]
    float* input_scales;  // int16: [tokens][chunks], and `arranged` holds int16
    float* totals;        // int16: [tokens][chunks][4]
    int64_t tasks, task_rows;
};

template <class Kernels>
void quantize_inputs(const MatmulPass& pass, int64_t token) {
    const Matrix& weight = pass.matmul->weight;
    const IntegerTable table(weight.table);
    const float* x = pass.matmul->x + (pass.first_token + token) * weight.inputs;
    for (int64_t c = 0, left = weight.inputs; c < pass.chunks; c++, left -= CHUNK) {
        const int64_t at = token * pass.chunks + c;
        int16_t* out = reinterpret_cast<int16_t*>(pass.arranged) + at * CHUNK;
        pass.input_scales[at] =
            Kernels::quantize_chunk(x + c * CHUNK, left < CHUNK ? left : CHUNK, weight.high_first,
                                    table, pass.unit, out, pass.totals + 4 * at);
    }
}

// A panel of tokens, or one token of a pass without panels, as [places][lanes].
template <class Kernels>
void arrange_inputs(const MatmulPass& pass, int64_t panel, int64_t panel_tokens) {
    const Matrix& weight = pass.matmul->weight;
    const int64_t places = pass.chunks * CHUNK, first = panel * panel_tokens;
    const bool direct = !pass.lanes;
    const int64_t left = pass.tokens - first, tokens = left < panel_tokens ? left : panel_tokens;
    const int64_t lanes = direct ? 1 : left <= panel_tokens ? pass.lanes : panel_tokens;
    const float* x = pass.matmul->x + (pass.first_token + first) * weight.inputs;
    float* out = pass.arranged + first * places;
    for (int64_t place = 0; place < places; place++) {
        int64_t input = place / CHUNK * CHUNK + input_at(place % CHUNK, weight.high_first);
        for (int64_t t = 0; t < tokens; t++)
            out[place * lanes + t] = input < weight.inputs ? x[t * weight.inputs + input] : 0;
        for (int64_t t = tokens; t < lanes; t++) out[place * lanes + t] = 0;
    }
}

template <class Kernels>
void multiply_int16(const MatmulPass& pass, int64_t task, const Scratch& scratch) {
    const Matrix& weight = pass.matmul->weight;
    const IntegerTable table(weight.table);
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
    const float* x = pass.arranged;
    const int64_t pitch = pass.chunks * CHUNK, unit = pass.unit;
    if constexpr (!Kernels::VECTORS) {
        Kernels::multiply_row(weight, x, pitch, pass.tokens, row, unit, scratch, y);
    } else {
        const auto multiply = [&](auto kernel) { kernel(weight, x, pitch, row, unit, scratch, y); };
        switch (pass.tokens + (weight.zeros ? DIRECT_TOKENS : 0)) {
        case 1:
            return multiply(Kernels::template multiply_row<1, false>);
        case 2:
            return multiply(Kernels::template multiply_row<2, false>);
        case 3:
            return multiply(Kernels::template multiply_row<3, false>);
        case 4:
            return multiply(Kernels::template multiply_row<4, false>);
        case 5:
            return multiply(Kernels::template multiply_row<1, true>);
        case 6:
            return multiply(Kernels::template multiply_row<2, true>);
        case 7:
            return multiply(Kernels::template multiply_row<3, true>);
        default:
            return multiply(Kernels::template multiply_row<4, true>);
        }
    }
}

template <class Kernels>
void multiply_direct(const MatmulPass& pass, int64_t task, const Scratch& scratch) {
    const Matrix& weight = pass.matmul->weight;
    const int64_t places = pass.chunks * CHUNK, last = (task + 1) * pass.task_rows;
    const int64_t end = last < weight.rows ? last : weight.rows;
    float* y = pass.matmul->y + pass.first_token * weight.rows;
    for (int64_t row = task * pass.task_rows; row < end; row++) {
        if (pass.unit) {
            const int64_t units = weight.inputs / pass.unit;
            prefetch_scales(weight, row + 8);
            read_scales<Kernels>(weight, pass.unit, row, 0, units, units + 8, scratch.scales,
                                 weight.zeros ? scratch.zeros : nullptr);
            multiply_row<Kernels>(pass, row, scratch, y);
            continue;
        }
        float sums[DIRECT_TOKENS] = {}, values[CHUNK];
        for (int64_t c = 0; c < pass.chunks; c++) {
            decode_chunk_slowly(weight, row, c, values);
            for (int64_t t = 0; t < pass.tokens; t++) {
                const float* x = pass.arranged + t * places + c * CHUNK;
                for (int64_t i = 0; i < CHUNK; i++) sums[t] += values[i] * x[i];
            }
        }
        for (int64_t t = 0; t < pass.tokens; t++) y[t * weight.rows + row] = sums[t];
    }
}

template <class Kernels>
void multiply_tiles(const MatmulPass& pass, int64_t task, const Scratch& scratch,
                    int64_t panel_tokens) {
    const Matrix& weight = pass.matmul->weight;
    const int64_t first = task * TILE_ROWS;
    const int64_t rows = weight.rows - first < TILE_ROWS ? weight.rows - first : TILE_ROWS;
    const int64_t padded = round_up(rows, 12), places = pass.chunks * CHUNK;
    memset(scratch.sums, 0, sizeof(float) * TILE_ROWS * round_up(pass.tokens, panel_tokens));
    if (padded > rows)
        memset(scratch.tile + rows * TILE_PITCH, 0, sizeof(float) * (padded - rows) * TILE_PITCH);
    for (int64_t at = 0; at < places; at += TILE_INPUTS) {
        const int64_t depth = places - at < TILE_INPUTS ? places - at : TILE_INPUTS;
        for (int64_t r = 0; r < rows; r++)
            decode<Kernels>(weight, pass.unit, first + r, at / CHUNK, (at + depth) / CHUNK, scratch,
                            scratch.tile + r * TILE_PITCH);
        for (int64_t t = 0; t < pass.tokens; t += panel_tokens) {
            const int64_t lanes = t + panel_tokens >= pass.tokens ? pass.lanes : panel_tokens;
            Kernels::multiply_tile(scratch.tile, padded, depth,
                                   pass.arranged + t * places + at * lanes, lanes,
                                   scratch.sums + t * TILE_ROWS);
        }
    }
    float* y = pass.matmul->y + pass.first_token * weight.rows + first;
    for (int64_t t = 0; t < pass.tokens; t++) {
        const int64_t panel = t / panel_tokens * panel_tokens;
        const int64_t lanes = panel + panel_tokens >= pass.tokens ? pass.lanes : panel_tokens;
        const float* sums = scratch.sums + panel * TILE_ROWS + t % panel_tokens;
        for (int64_t r = 0; r < rows; r++) y[t * weight.rows + r] = sums[r * lanes];
    }
}

template <class Kernels>
std::vector<MatmulPass> plan_passes(const Matmul* matmuls, int64_t count, int threads) {
    const int64_t panel_tokens = Kernels::lanes(MAX_TOKENS);
    std::vector<MatmulPass> passes;
    for (int64_t i = 0; i < count; i++) {
        const Matrix& weight = matmuls[i].weight;
        const int64_t unit = scale_unit(weight);
        const bool int16 = Kernels::INT16 && unit && matmuls[i].quantize_activations &&
                           (!weight.zeros || IntegerTable(weight.table).linear);
        const int64_t max_tokens = int16 ? INT16_TOKENS : MAX_TOKENS;
        for (int64_t first = 0; first < matmuls[i].tokens; first += max_tokens) {
            MatmulPass pass{};
            const int64_t left = matmuls[i].tokens - first;
            pass.matmul = matmuls + i;
            pass.first_token = first;
            pass.tokens = left < max_tokens ? left : max_tokens;
            pass.unit = unit;
            pass.chunks = round_up(weight.inputs, CHUNK) / CHUNK;
            pass.int16 = int16;
            if (pass.tokens > DIRECT_TOKENS && !int16) {
                pass.lanes = Kernels::lanes((pass.tokens - 1) % panel_tokens + 1);
                pass.task_rows = TILE_ROWS;
            } else {
                int64_t bytes = weight.rows * weight.inputs / 2 / (16 * threads);
                bytes = bytes > MAX_TASK_BYTES   ? MAX_TASK_BYTES
                        : bytes < MIN_TASK_BYTES ? MIN_TASK_BYTES
                                                 : bytes;
                pass.task_rows = round_up(bytes / (weight.inputs / 2 + 1) + 1, ROWS_AT_ONCE);
            }
            pass.tasks = round_up(weight.rows, pass.task_rows) / pass.task_rows;
            passes.push_back(pass);
        }
    }
    return passes;
}

// The memory of a matmul, in floats, with cache lines of its own for every thread.
struct Workspace {
    int64_t arranged = 0;                    // all passes'
    int64_t scales = 0, tile = 0, sums = 0;  // of one row, of one thread, of one thread
    float* memory = nullptr;

    Workspace(const std::vector<MatmulPass>& passes, int64_t panel_tokens, int threads) {
        int64_t units = 0;
        for (const MatmulPass& pass : passes) {
            const int64_t panel = pass.lanes ? panel_tokens : 1;
            const int64_t padded = round_up(pass.tokens, panel);
            arranged += padded * pass.chunks * CHUNK;
            if (pass.int16) arranged += round_up(5 * pass.tokens * pass.chunks, 16);
            if (pass.lanes && sums < TILE_ROWS * padded) sums = TILE_ROWS * padded;
            if (pass.unit && units < pass.matmul->weight.inputs / pass.unit)
                units = pass.matmul->weight.inputs / pass.unit;
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

    int64_t of_thread() const { return 2 * ROWS_AT_ONCE * scales + tile + sums; }

    Scratch scratch(int thread) const {
        float* start = memory + arranged + thread * of_thread();
        float* tiles = start + 2 * ROWS_AT_ONCE * scales;
        return {start, start + ROWS_AT_ONCE * scales, tiles, tiles + tile, scales};
    }
};

// Whether two passes multiply the same inputs, arranged in the same way.
bool same_inputs(const MatmulPass& one, const MatmulPass& other) {
    const Matrix &weight = one.matmul->weight, &other_weight = other.matmul->weight;
    return one.matmul->x == other.matmul->x && one.first_token == other.first_token &&
           one.tokens == other.tokens && weight.inputs == other_weight.inputs &&
           one.int16 == other.int16 && (!one.int16 || one.unit == other.unit) &&
           weight.high_first == other_weight.high_first &&
           (!one.int16 || !memcmp(weight.table, other_weight.table, 16 * sizeof(float)));
}

// A panel of a pass, or one token of a pass without panels.
struct Panel {
    const MatmulPass* pass;
    int64_t index;
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
        memory += round_up(pass.tokens, panel) * pass.chunks * CHUNK;
        if (pass.int16) {
            pass.input_scales = memory;
            pass.totals = memory + pass.tokens * pass.chunks;
            memory += round_up(5 * pass.tokens * pass.chunks, 16);
        }
        for (int64_t p = 0; p * panel < pass.tokens; p++) panels.push_back({&pass, p});
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
    const Workspace workspace(passes, panel_tokens, threads);
    const std::vector<Panel> panels = place_inputs(passes, workspace.memory, panel_tokens);

    int64_t tasks = 0, arranged = 0;
    for (const MatmulPass& pass : passes) tasks += pass.tasks;
    for (const Panel& panel : panels)
        if (!panel.index) arranged += panel.pass->tokens * panel.pass->chunks * CHUNK;
    const auto arrange = [&](int64_t i, int) {
        const MatmulPass& pass = *panels[i].pass;
        if constexpr (Kernels::INT16)
            if (pass.int16) return quantize_inputs<Kernels>(pass, panels[i].index);
        arrange_inputs<Kernels>(pass, panels[i].index, pass.lanes ? panel_tokens : 1);
    };
    parallel_for(int64_t(panels.size()), arranged > (1 << 16) ? threads : 1, fork, arrange);
    parallel_for(tasks, threads, fork, [&](int64_t task, int thread) {
        const MatmulPass* pass = passes.data();
        while (task >= pass->tasks) task -= pass++->tasks;
        const Scratch scratch = workspace.scratch(thread);
        if constexpr (Kernels::INT16)
            if (pass->int16) return multiply_int16<Kernels>(*pass, task, scratch);
        if (pass->lanes)
            multiply_tiles<Kernels>(*pass, task, scratch, panel_tokens);
        else
            multiply_direct<Kernels>(*pass, task, scratch);
    });
}

}  // namespace
