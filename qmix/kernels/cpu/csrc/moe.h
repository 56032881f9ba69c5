// Experts and the tokens that go through them, in a decode step or in a prompt.
//
// A token has a row for each of its experts. Rows lie expert by expert, so that each expert is read
// once for all of its tokens, and several experts share the parallel regions. What a row becomes
// does not depend on the other experts. Within an expert values are float32.

#pragma once

#include <memory>
#include <vector>

#include "matmul.h"

namespace {

// Experts with no more rows than this are multiplied together: what bounds a prompt's memory.
constexpr int64_t GROUP_ROWS = 512;
constexpr int64_t SUM_OUTPUTS = 64;  // that a thread adds up at a time, of all rows

// An expert and the tokens that go through it.
struct ChosenExpert {
    const ExpertMatrices* expert;
    const int64_t* tokens;
    const float* routing_weights;
    int64_t count;
};

// Which values of an expert may be rounded.
struct ExpertRounding {
    int32_t quantize_activations;  // as in Matmul
    int32_t bfloat16_hidden;       // what comes of SwiGLU becomes bfloat16
};

// A token's row in one of its experts.
struct ExpertRow {
    const ExpertMatrices* expert;
    int64_t token;
    float routing_weight;
};

// The inputs of a matmul in the order that its weight stores them.
inline void copy_permuted(const float* x, int64_t count, const int32_t* perm, float* out) {
    if (!perm) {
        memcpy(out, x, sizeof(float) * count);
        return;
    }
    for (int64_t i = 0; i < count; i++) out[i] = x[perm[i]];
}

// The values of rows. Those that share a place are never needed at once.
struct RowValues {
    int64_t inputs, width, outputs;
    std::unique_ptr<float[]> memory;  // written before it is read: zeros would take time
    float *gate_x, *up_x;             // [rows][inputs], in one place where no weight has an order
    float *gates, *ups;               // [rows][width]
    float *hidden, *downs;            // in place of `gates`; [rows][outputs] in place of `ups`
    float* spare;                     // [threads][width]

    RowValues(const std::vector<ExpertRow>& rows, int threads) {
        const ExpertMatrices& first = *rows[0].expert;
        inputs = first.gate.inputs, width = first.gate.rows, outputs = first.down.rows;
        bool ordered = false;
        for (const ExpertRow& row : rows)
            ordered = ordered || row.expert->gate_perm || row.expert->up_perm;
        const int64_t count = int64_t(rows.size()), wider = width > outputs ? width : outputs;
        const int64_t floats = count * ((ordered ? 2 : 1) * inputs + width + wider);
        memory.reset(new float[size_t(floats + threads * width)]);
        hidden = gates = memory.get();
        downs = ups = gates + count * width;
        gate_x = ups + count * wider;
        up_x = ordered ? gate_x + count * inputs : gate_x;
        spare = memory.get() + floats;
    }

    void gather(const ExpertRow& row, int64_t index, const float* x) {
        x += row.token * inputs;
        copy_permuted(x, inputs, row.expert->gate_perm, gate_x + index * inputs);
        if (up_x != gate_x)
            copy_permuted(x, inputs, row.expert->up_perm, up_x + index * inputs);
    }

    void activate(const ExpertRow& row, int64_t index, bool to_bfloat16, int thread) {
        float* out = hidden + index * width;
        float* values = row.expert->down_perm ? spare + thread * width : out;
        swiglu(gates + index * width, ups + index * width, width, values);
        for (int64_t i = 0; to_bfloat16 && i < width; i++) values[i] = round_to_bfloat16(values[i]);
        if (values != out) copy_permuted(values, width, row.expert->down_perm, out);
    }
};

// Adds the weighted outputs of a few experts to y, in their order.
template <class Kernels>
void add_group(const ChosenExpert* first, const ChosenExpert* last, const float* x, float* y,
               const ExpertRounding& rounding, int threads, Fork fork) {
    std::vector<ExpertRow> rows;
    for (const ChosenExpert* one = first; one < last; one++)
        for (int64_t t = 0; t < one->count; t++)
            rows.push_back({one->expert, one->tokens[t], one->routing_weights[t]});
    const int64_t count = int64_t(rows.size());
    RowValues values(rows, threads);
    const int64_t inputs = values.inputs, width = values.width, outputs = values.outputs;
    const auto of_values = [&](int64_t each) { return count * each < MIN_SHARED ? 1 : threads; };
    const int32_t quantize = rounding.quantize_activations;

    parallel_for(count, of_values(inputs), fork,
                 [&](int64_t row, int) { values.gather(rows[row], row, x); });
    std::vector<Matmul> matmuls;
    int64_t row = 0;
    for (const ChosenExpert* one = first; one < last; row += one++->count) {
        const float *gate_x = values.gate_x + row * inputs, *up_x = values.up_x + row * inputs;
        float *gates = values.gates + row * width, *ups = values.ups + row * width;
        matmuls.push_back({one->expert->gate, gate_x, gates, one->count, quantize});
        matmuls.push_back({one->expert->up, up_x, ups, one->count, quantize});
    }
    multiply_all<Kernels>(matmuls.data(), int64_t(matmuls.size()), threads, fork);
    parallel_for(count, of_values(width), fork, [&](int64_t each, int thread) {
        values.activate(rows[each], each, rounding.bfloat16_hidden, thread);
    });
    matmuls.clear();
    row = 0;
    for (const ChosenExpert* one = first; one < last; row += one++->count)
        matmuls.push_back({one->expert->down, values.hidden + row * width,
                           values.downs + row * outputs, one->count, quantize});
    multiply_all<Kernels>(matmuls.data(), int64_t(matmuls.size()), threads, fork);
    parallel_for(round_up(outputs, SUM_OUTPUTS) / SUM_OUTPUTS, of_values(outputs), fork,
                 [&](int64_t task, int) {
                     const int64_t start = task * SUM_OUTPUTS, end = start + SUM_OUTPUTS;
                     for (int64_t each = 0; each < count; each++) {
                         const float* own = values.downs + each * outputs;
                         float* sums = y + rows[each].token * outputs;
                         for (int64_t i = start; i < (end < outputs ? end : outputs); i++)
                             sums[i] += rows[each].routing_weight * own[i];
                     }
                 });
}

// Adds the weighted outputs of experts to y [tokens, outputs], in their order. All experts have the
// sizes of the first.
template <class Kernels>
void add_experts(const std::vector<ChosenExpert>& chosen, const float* x, float* y,
                 const ExpertRounding& rounding, int threads, Fork fork) {
    const ChosenExpert *first = chosen.data(), *const end = first + chosen.size();
    while (first < end) {
        const ChosenExpert* last = first + 1;
        for (int64_t rows = first->count; last < end; last++)
            if ((rows += last->count) > GROUP_ROWS) break;
        add_group<Kernels>(first, last, x, y, rounding, threads, fork);
        first = last;
    }
}

}  // namespace
