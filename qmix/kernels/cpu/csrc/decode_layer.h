// One token through layers. What torch's operations would spend here five times as long on: the
// weights that pass in between leave nothing of the small tensors in a cache.
//
// Values between operations are bfloat16, rounded where torch rounds them; within an expert they
// are float32.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "attention.h"
#include "dense.h"
#include "matmul.h"

namespace {

// The inputs of a matmul, in the order that its weight stores them.
inline const float* permuted(const float* x, int64_t count, const int32_t* perm,
                             std::vector<float>& out) {
    if (!perm) return x;
    out.resize(size_t(count));
    for (int64_t i = 0; i < count; i++) out[i] = x[perm[i]];
    return out.data();
}

// Adds the weighted outputs of experts to y, for one token. All experts have the sizes of the
// first.
template <class Kernels>
void moe_token(const ExpertMatrices* experts, int64_t count, const float* x, float* y,
               int32_t quantize_activations, int threads, Fork fork) {
    constexpr int64_t STEP = 2048;
    const int64_t inputs = experts->gate.inputs, width = experts->gate.rows;
    const int64_t outputs = experts->down.rows, steps = round_up(width, STEP) / STEP;
    std::vector<float> values(size_t(count * (3 * width + outputs)));
    std::vector<std::vector<float>> moved(size_t(2 * count));
    float* hidden = values.data() + 2 * count * width;
    float* downs = hidden + count * width;
    std::vector<Matmul> matmuls;
    for (int64_t e = 0; e < count; e++) {
        const ExpertMatrices& expert = experts[e];
        float* gate = values.data() + 2 * e * width;
        const float* gate_x = permuted(x, inputs, expert.gate_perm, moved[2 * e]);
        matmuls.push_back({expert.gate, gate_x, gate, 1, quantize_activations});
        const float* up_x = permuted(x, inputs, expert.up_perm, moved[2 * e + 1]);
        matmuls.push_back({expert.up, up_x, gate + width, 1, quantize_activations});
    }
    multiply_all<Kernels>(matmuls.data(), 2 * count, threads, fork);
    parallel_for(count * steps, threads, fork, [&](int64_t task, int) {
        const int64_t e = task / steps, first = task % steps * STEP;
        const int64_t length = width - first < STEP ? width - first : STEP;
        const float* gate = values.data() + 2 * e * width + first;
        Kernels::swiglu(gate, gate + width, length, hidden + e * width + first);
    });
    matmuls.clear();
    for (int64_t e = 0; e < count; e++) {
        const float* down_x = permuted(hidden + e * width, width, experts[e].down_perm, moved[e]);
        matmuls.push_back({experts[e].down, down_x, downs + e * outputs, 1, quantize_activations});
    }
    multiply_all<Kernels>(matmuls.data(), count, threads, fork);
    for (int64_t e = 0; e < count; e++)
        for (int64_t i = 0; i < outputs; i++)
            y[i] += experts[e].routing_weight * downs[e * outputs + i];
}

// Norm, projections and rotation: `qkv` is queries and keys, rotated, and values.
template <class Kernels>
void before_attention(const TokenLayer& layer, const uint16_t* x, const uint16_t* cos,
                      const uint16_t* sin, uint16_t* qkv, int threads, Fork fork) {
    const int64_t hidden = layer.hidden, width = layer.head_dim;
    const int64_t rotated = layer.q.rows + layer.k.rows, outputs = rotated + layer.v.rows;
    std::vector<uint16_t> normed(hidden);
    rms_norm(x, layer.input_norm, hidden, layer.eps, normed.data());
    std::vector<float> inputs(hidden), out(outputs), moved[3];
    for (int64_t i = 0; i < hidden; i++) inputs[i] = bfloat16_to_float(normed[i]);
    const float* q_x = permuted(inputs.data(), hidden, layer.perms[0], moved[0]);
    const float* k_x = permuted(inputs.data(), hidden, layer.perms[1], moved[1]);
    const float* v_x = permuted(inputs.data(), hidden, layer.perms[2], moved[2]);
    const Matmul matmuls[3] = {
        {layer.q, q_x, out.data(), 1, 1},
        {layer.k, k_x, out.data() + layer.q.rows, 1, 1},
        {layer.v, v_x, out.data() + rotated, 1, 1},
    };
    multiply_all<Kernels>(matmuls, 3, threads, fork);
    for (float& value : out) value = round_to_bfloat16(value);
    for (int64_t head = 0; head < rotated; head += width)
        for (int64_t i = 0; i < width; i++) {
            const float other =
                i < width / 2 ? -out[head + i + width / 2] : out[head + i - width / 2];
            const float plain = round_to_bfloat16(out[head + i] * bfloat16_to_float(cos[i]));
            const float turned = round_to_bfloat16(other * bfloat16_to_float(sin[i]));
            qkv[head + i] = float_to_bfloat16(plain + turned);
        }
    for (int64_t i = rotated; i < outputs; i++) qkv[i] = float_to_bfloat16(out[i]);
}

// The router: a softmax over all experts in float32, the largest ones renormalised to sum 1. Equal
// logits are ordered as by torch.topk, which sorts with the same functions, so that a prompt, which
// torch routes, takes the same experts.
inline void route(const uint16_t* logits, int64_t num_experts, int64_t chosen, int64_t* ids,
                  float* weights) {
    typedef std::pair<float, int64_t> Entry;
    std::vector<Entry> entries(num_experts);
    float highest = bfloat16_to_float(logits[0]), sum = 0, chosen_sum = 0;
    for (int64_t e = 1; e < num_experts; e++) {
        const float logit = bfloat16_to_float(logits[e]);
        highest = logit > highest ? logit : highest;
    }
    for (int64_t e = 0; e < num_experts; e++) {
        entries[e] = {__builtin_expf(bfloat16_to_float(logits[e]) - highest), e};
        sum += entries[e].first;
    }
    for (Entry& entry : entries) entry.first /= sum;
    const auto before = [](const Entry& a, const Entry& b) {
        return (a.first != a.first && b.first == b.first) || a.first > b.first;
    };
    const auto first = entries.begin(), last = first + chosen;
    if (chosen * 64 <= num_experts) {
        std::partial_sort(first, last, entries.end(), before);
    } else {
        std::nth_element(first, last - 1, entries.end(), before);
        std::sort(first, last - 1, before);
    }
    for (int64_t i = 0; i < chosen; i++) {
        ids[i] = entries[i].second;
        chosen_sum += weights[i] = entries[i].first;
    }
    for (int64_t i = 0; i < chosen; i++) weights[i] /= chosen_sum;
}

// The experts that `out` names, in ascending order, with their routing weights.
inline std::vector<ExpertMatrices> chosen_experts(const TokenLayer& layer, const TokenRoute& out) {
    std::vector<ExpertMatrices> experts;
    for (int64_t e = 0; e < layer.num_experts; e++)
        for (int64_t i = 0; i < layer.experts_per_token; i++)
            if (out.ids[i] == e) {
                experts.push_back(layer.experts[e]);
                experts.back().routing_weight = out.routing_weights[i];
            }
    return experts;
}

// Output projection, residual, norm and router, and the experts if the layer has them.
template <class Kernels>
void after_attention(const TokenLayer& layer, const TokenRoute& out, const uint16_t* attended,
                     const uint16_t* x, int threads, Fork fork) {
    const int64_t hidden = layer.hidden, num_experts = layer.num_experts;
    std::vector<float> inputs(layer.o.inputs), values(hidden), moved, logits(num_experts);
    for (int64_t i = 0; i < layer.o.inputs; i++) inputs[i] = bfloat16_to_float(attended[i]);
    const float* o_x = permuted(inputs.data(), layer.o.inputs, layer.perms[3], moved);
    const Matmul o_proj{layer.o, o_x, values.data(), 1, 1};
    multiply_all<Kernels>(&o_proj, 1, threads, fork);
    for (int64_t i = 0; i < hidden; i++)
        out.residual[i] = float_to_bfloat16(bfloat16_to_float(x[i]) + round_to_bfloat16(values[i]));
    rms_norm(out.residual, layer.post_norm, hidden, layer.eps, out.normed);
    for (int64_t i = 0; i < hidden; i++) values[i] = bfloat16_to_float(out.normed[i]);
    multiply_dense({layer.router, values.data(), logits.data(), num_experts, hidden, 1}, 0, num_experts);
    for (int64_t e = 0; e < num_experts; e++) out.logits[e] = float_to_bfloat16(logits[e]);
    route(out.logits, num_experts, layer.experts_per_token, out.ids, out.routing_weights);
    if (!layer.experts) return;
    const std::vector<ExpertMatrices> experts = chosen_experts(layer, out);
    std::vector<float> sum(hidden);
    moe_token<Kernels>(experts.data(), layer.experts_per_token, values.data(), sum.data(), 1,
                       threads, fork);
    for (int64_t i = 0; i < hidden; i++)
        out.residual[i] =
            float_to_bfloat16(bfloat16_to_float(out.residual[i]) + round_to_bfloat16(sum[i]));
}

// All of several layers, whose experts must be among them.
template <class Kernels>
void decode_token(const TokenLayer* const* layers, int64_t count, const TokenStep& step,
                  int threads, Fork fork) {
    for (int64_t i = 0; i < count; i++) {
        const TokenLayer& layer = *layers[i];
        const int64_t width = layer.head_dim, groups = layer.k.rows / width;
        std::vector<uint16_t> qkv(layer.q.rows + layer.k.rows + layer.v.rows);
        std::vector<uint16_t> attended(layer.q.rows), normed(layer.hidden);
        std::vector<int64_t> ids(layer.experts_per_token);
        std::vector<float> routing_weights(layer.experts_per_token);
        before_attention<Kernels>(layer, step.x, step.cos, step.sin, qkv.data(), threads,
                                  fork);
        const uint16_t *keys = qkv.data() + layer.q.rows, *values = keys + layer.k.rows;
        TokenAttention attention{
            qkv.data(), keys,           values, attended.data(), layer.q.rows / width, groups,
            width,      step.positions, width};
        if (step.caches) {
            const TokenCache& cache = step.caches[i];
            const size_t bytes = sizeof(uint16_t) * width;
            for (int64_t g = 0; g < groups; g++) {
                const int64_t at = g * cache.pitch + step.slot * width;
                memcpy(cache.keys + at, keys + g * width, bytes);
                memcpy(cache.values + at, values + g * width, bytes);
            }
            attention.keys = cache.keys;
            attention.values = cache.values;
            attention.pitch = cache.pitch;
        }
        attend(attention, threads, fork);
        const TokenRoute out{step.x, normed.data(), step.logits + i * layer.num_experts, ids.data(),
                             routing_weights.data()};
        after_attention<Kernels>(layer, out, attended.data(), step.x, threads, fork);
    }
}

}  // namespace
