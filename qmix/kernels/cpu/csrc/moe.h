// Experts and the tokens that go through them, in a decode step or in a prompt.
//
// A token has a row for each of its experts. Rows lie expert by expert, so that each expert is read
// once for all of its tokens. What a row becomes does not depend on the other rows' experts. Within
// an expert values are float32.

#pragma once

#include <memory>
#include <vector>

#include "matmul.h"

namespace {

// Experts that have no more rows together are a group. Its values then fit memory that the process
// has already: for 67 MB, 512 rows of Mixtral's, the system takes longer than this saves.
constexpr int64_t GROUP_ROWS = 128;
// Below this many values, 20 us of SwiGLU on one core, no other thread is woken.
constexpr int64_t MIN_VALUES = 1 << 16;
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

// The inputs of a matmul in the order that its weight stores them.
inline void copy_permuted(const float* x, int64_t count, const int32_t* perm, float* out) {
    if (!perm) {
        memcpy(out, x, sizeof(float) * count);
        return;
    }
    for (int64_t i = 0; i < count; i++) out[i] = x[perm[i]];
}

// Experts [first, last), all of the same sizes, and the values of their rows.
class ExpertGroup {
public:
    ExpertGroup(const ChosenExpert* first, const ChosenExpert* last, int threads, Fork fork)
        : first_(first), last_(last), threads_(threads), fork_(fork) {
        const ExpertMatrices& sizes = *first->expert;
        inputs_ = sizes.gate.inputs, width_ = sizes.gate.rows, outputs_ = sizes.down.rows;
        bool ordered = false;
        for (const ChosenExpert* one = first; one < last; one++) {
            ordered = ordered || one->expert->gate_perm || one->expert->up_perm;
            for (int64_t t = 0; t < one->count; t++) rows_.push_back({one, t});
        }
        // All of it is written before it is read; zeros would take one thread's time.
        const int64_t wider = width_ > outputs_ ? width_ : outputs_;
        const int64_t each = width_ + wider + (ordered ? 2 : 1) * inputs_;
        memory_.reset(new float[size_t(count() * each + threads * width_)]);
        gates_ = memory_.get();
        ups_ = gates_ + count() * width_;
        gate_x_ = ups_ + count() * wider;
        up_x_ = ordered ? gate_x_ + count() * inputs_ : gate_x_;
        spare_ = memory_.get() + count() * each;
    }

    void gather(const float* x) {
        for_rows(inputs_, [&](const Row& row, int64_t i, int) {
            const float* own = x + row.chosen->tokens[row.index] * inputs_;
            const ExpertMatrices& expert = *row.chosen->expert;
            copy_permuted(own, inputs_, expert.gate_perm, gate_x_ + i * inputs_);
            if (up_x_ != gate_x_)
                copy_permuted(own, inputs_, expert.up_perm, up_x_ + i * inputs_);
        });
    }

    void append_gate_and_up(int32_t quantize, std::vector<Matmul>& matmuls) const {
        int64_t row = 0;
        for (const ChosenExpert* one = first_; one < last_; row += one++->count) {
            const float *gate_x = gate_x_ + row * inputs_, *up_x = up_x_ + row * inputs_;
            float *gates = gates_ + row * width_, *ups = ups_ + row * width_;
            matmuls.push_back({one->expert->gate, gate_x, gates, one->count, quantize});
            matmuls.push_back({one->expert->up, up_x, ups, one->count, quantize});
        }
    }

    // SwiGLU, in the order of the inputs of `down`, in place of the gates.
    void activate(bool to_bfloat16) {
        for_rows(width_, [&](const Row& row, int64_t i, int thread) {
            const int32_t* perm = row.chosen->expert->down_perm;
            float* out = gates_ + i * width_;
            float* values = perm ? spare_ + thread * width_ : out;
            swiglu(out, ups_ + i * width_, width_, values);
            if (to_bfloat16)
                for (int64_t k = 0; k < width_; k++) values[k] = round_to_bfloat16(values[k]);
            if (perm) copy_permuted(values, width_, perm, out);
        });
    }

    // Its outputs take the place of the ups.
    void append_down(int32_t quantize, std::vector<Matmul>& matmuls) const {
        int64_t row = 0;
        for (const ChosenExpert* one = first_; one < last_; row += one++->count)
            matmuls.push_back({one->expert->down, gates_ + row * width_, ups_ + row * outputs_,
                               one->count, quantize});
    }

    // Adds the weighted outputs to y [tokens, outputs], a token's in the order of its experts.
    void add(float* y) const {
        const int64_t tasks = round_up(outputs_, SUM_OUTPUTS) / SUM_OUTPUTS;
        parallel_for(tasks, threads_for(outputs_), fork_, [&](int64_t task, int) {
            const int64_t start = task * SUM_OUTPUTS, end = start + SUM_OUTPUTS;
            const int64_t stop = end < outputs_ ? end : outputs_;
            for (int64_t i = 0; i < count(); i++) {
                const Row& row = rows_[i];
                const float weight = row.chosen->routing_weights[row.index];
                float* sums = y + row.chosen->tokens[row.index] * outputs_;
                for (int64_t k = start; k < stop; k++) sums[k] += weight * ups_[i * outputs_ + k];
            }
        });
    }

private:
    struct Row {
        const ChosenExpert* chosen;
        int64_t index;  // among the expert's
    };

    int64_t count() const { return int64_t(rows_.size()); }
    int threads_for(int64_t each) const { return count() * each < MIN_VALUES ? 1 : threads_; }

    template <class Body>
    void for_rows(int64_t each, const Body& body) const {
        parallel_for(count(), threads_for(each), fork_,
                     [&](int64_t i, int thread) { body(rows_[i], i, thread); });
    }

    const ChosenExpert *first_, *last_;
    int threads_;
    Fork fork_;
    int64_t inputs_, width_, outputs_;
    std::vector<Row> rows_;
    std::unique_ptr<float[]> memory_;
    float *gate_x_, *up_x_;  // [rows][inputs], in one place where no weight has an order of its own
    float *gates_, *ups_;    // [rows][width]
    float* spare_;           // [threads][width]
};

// Adds the weighted outputs of experts to y [tokens, outputs], in their order. All experts have the
// sizes of the first. One group's `down` shares its region with the next one's `gate` and `up`: the
// more tasks a region has, the less its threads wait for the last.
template <class Kernels>
void add_experts(const std::vector<ChosenExpert>& chosen, const float* x, float* y,
                 const ExpertRounding& rounding, int threads, Fork fork) {
    const ChosenExpert *first = chosen.data(), *const end = first + chosen.size();
    std::unique_ptr<ExpertGroup> group, before;
    while (first < end || before) {
        std::vector<Matmul> matmuls;
        if (first < end) {
            const ChosenExpert* last = first + 1;
            for (int64_t rows = first->count; last < end; last++)
                if ((rows += last->count) > GROUP_ROWS) break;
            group.reset(new ExpertGroup(first, last, threads, fork));
            group->gather(x);
            group->append_gate_and_up(rounding.quantize_activations, matmuls);
            first = last;
        }
        if (before) before->append_down(rounding.quantize_activations, matmuls);
        multiply_all<Kernels>(matmuls.data(), int64_t(matmuls.size()), threads, fork);
        if (before) before->add(y);
        if (group) group->activate(rounding.bfloat16_hidden);
        before = std::move(group);
    }
}

}  // namespace
