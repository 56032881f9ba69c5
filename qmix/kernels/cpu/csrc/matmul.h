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

#include "matmul_pass.h"
#include "threads.h"

namespace {

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
            arranged += pass.inputs() + pass.int16_floats();
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
        memory += pass.inputs();
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
