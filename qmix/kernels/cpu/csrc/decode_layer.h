// One new token of each of a few texts through layers. What torch's operations would spend here five
// times as long on: the weights that pass in between leave nothing of the small tensors in a cache.
//
// Values between operations are bfloat16, rounded where torch rounds them; within an expert they
// are float32. What is computed of a token does not depend on how many tokens there are, as long as
// matmuls take them one by one (see Kernels in matmul.h).

#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "attention.h"
#include "dense.h"
#include "moe.h"

namespace {

// The inputs [tokens, count] of a matmul, in the order that its weight stores them.
inline const float* permuted(const float* x, int64_t tokens, int64_t count, const int32_t* perm,
                             std::vector<float>& out) {
    if (!perm) return x;
    out.resize(size_t(tokens * count));
    for (int64_t t = 0; t < tokens; t++)
        copy_permuted(x + t * count, count, perm, out.data() + t * count);
    return out.data();
}

// x [width] turned by its position: queries or keys of a head, rounded as torch rounds them.
inline void rotate(const float* x, const uint16_t* cos, const uint16_t* sin, int64_t width,
                   uint16_t* out) {
    for (int64_t i = 0; i < width; i++) {
        const float other = i < width / 2 ? -x[i + width / 2] : x[i - width / 2];
        const float plain = round_to_bfloat16(x[i] * bfloat16_to_float(cos[i]));
        const float turned = round_to_bfloat16(other * bfloat16_to_float(sin[i]));
        out[i] = float_to_bfloat16(plain + turned);
    }
}

// Norm, projections and rotation of x [tokens, hidden]: each token's row of `qkv` is queries and
// keys, rotated by its row of cos and sin, and values.
template <class Kernels>
void before_attention(const TokenLayer& layer, const uint16_t* x, int64_t tokens,
                      const uint16_t* cos, const uint16_t* sin, uint16_t* qkv, int threads,
                      Fork fork) {
    const int64_t hidden = layer.hidden, width = layer.head_dim;
    const Matrix* projections[3] = {&layer.q, &layer.k, &layer.v};
    const int64_t outputs = layer.q.rows + layer.k.rows + layer.v.rows;
    std::vector<uint16_t> normed(size_t(tokens * hidden));
    for (int64_t t = 0; t < tokens; t++)
        rms_norm(x + t * hidden, layer.input_norm, hidden, layer.eps, normed.data() + t * hidden);
    std::vector<float> inputs(normed.size()), moved[3], outs[3];
    for (size_t i = 0; i < normed.size(); i++) inputs[i] = bfloat16_to_float(normed[i]);
    Matmul matmuls[3];
    for (int i = 0; i < 3; i++) {
        outs[i].resize(size_t(tokens * projections[i]->rows));
        const float* own = permuted(inputs.data(), tokens, hidden, layer.perms[i], moved[i]);
        matmuls[i] = {*projections[i], own, outs[i].data(), tokens, 1};
    }
    multiply_all<Kernels>(matmuls, 3, threads, fork);
    for (int64_t t = 0; t < tokens; t++) {
        uint16_t* out = qkv + t * outputs;
        for (int i = 0; i < 3; i++) {
            const int64_t rows = projections[i]->rows;
            float* values = outs[i].data() + t * rows;
            for (int64_t row = 0; row < rows; row++) values[row] = round_to_bfloat16(values[row]);
            for (int64_t head = 0; i < 2 && head < rows; head += width)
                rotate(values + head, cos + t * width, sin + t * width, width, out + head);
            for (int64_t row = 0; i == 2 && row < rows; row++)
                out[row] = float_to_bfloat16(values[row]);
            out += rows;
        }
    }
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

// The experts that any of the tokens chose, in ascending order, and the tokens of each.
struct Choice {
    std::vector<ChosenExpert> experts;
    std::vector<int64_t> tokens;
    std::vector<float> routing_weights;

    Choice(const TokenLayer& layer, const TokenRoute& out, int64_t count) {
        const int64_t pairs = count * layer.experts_per_token;
        tokens.reserve(size_t(pairs)), routing_weights.reserve(size_t(pairs));
        for (int64_t e = 0; e < layer.num_experts; e++) {
            const size_t first = tokens.size();
            for (int64_t i = 0; i < pairs; i++)
                if (out.ids[i] == e) {
                    tokens.push_back(i / layer.experts_per_token);
                    routing_weights.push_back(out.routing_weights[i]);
                }
            const int64_t own = int64_t(tokens.size() - first);
            if (own)
                experts.push_back({&layer.experts[e], tokens.data() + first,
                                   routing_weights.data() + first, own});
        }
    }
};

// x plus y, both bfloat16 before they are added, y [count] in float32.
inline void add_rounded(const uint16_t* x, const std::vector<float>& y, uint16_t* out) {
    for (size_t i = 0; i < y.size(); i++)
        out[i] = float_to_bfloat16(bfloat16_to_float(x[i]) + round_to_bfloat16(y[i]));
}

// Output projection, residual, norm and router, and the experts if the layer has them.
template <class Kernels>
void after_attention(const TokenLayer& layer, const TokenRoute& out, int64_t tokens,
                     const uint16_t* attended, const uint16_t* x, int threads, Fork fork) {
    const int64_t hidden = layer.hidden, num_experts = layer.num_experts;
    const int64_t chosen = layer.experts_per_token;
    std::vector<float> inputs(size_t(tokens * layer.o.inputs)), moved;
    std::vector<float> values(size_t(tokens * hidden)), logits(size_t(tokens * num_experts));
    for (size_t i = 0; i < inputs.size(); i++) inputs[i] = bfloat16_to_float(attended[i]);
    const float* o_x = permuted(inputs.data(), tokens, layer.o.inputs, layer.perms[3], moved);
    const Matmul o_proj{layer.o, o_x, values.data(), tokens, 1};
    multiply_all<Kernels>(&o_proj, 1, threads, fork);
    add_rounded(x, values, out.residual);
    for (int64_t t = 0; t < tokens; t++)
        rms_norm(out.residual + t * hidden, layer.post_norm, hidden, layer.eps,
                 out.normed + t * hidden);
    for (size_t i = 0; i < values.size(); i++) values[i] = bfloat16_to_float(out.normed[i]);
    multiply_dense({layer.router, values.data(), logits.data(), num_experts, hidden, tokens}, 0,
                   num_experts);
    for (size_t i = 0; i < logits.size(); i++) out.logits[i] = float_to_bfloat16(logits[i]);
    for (int64_t t = 0; t < tokens; t++)
        route(out.logits + t * num_experts, num_experts, chosen, out.ids + t * chosen,
              out.routing_weights + t * chosen);
    if (!layer.experts) return;
    std::vector<float> sum(values.size());
    const Choice choice(layer, out, tokens);
    add_experts<Kernels>(choice.experts, values.data(), sum.data(), {1, 0}, threads, fork);
    add_rounded(out.residual, sum, out.residual);
}

// A token's keys or values [groups][width] into their slot of a cache.
inline void store_heads(const TokenCache& cache, void* place, const uint16_t* heads, int64_t groups,
                        int64_t width) {
    for (int64_t g = 0; g < groups; g++) {
        const uint16_t* head = heads + g * width;
        const int64_t start = g * cache.pitch;
        if (cache.codes)
            quantize_row(head, width,
                         static_cast<int8_t*>(place) + start + cache.slot * CodeRows::size(width));
        else
            memcpy(static_cast<uint16_t*>(place) + start + cache.slot * width, head,
                   sizeof(uint16_t) * width);
    }
}

// All of several layers, whose experts must be among them.
template <class Kernels>
void decode_tokens(const TokenLayer* const* layers, int64_t count, const TokenStep& step,
                   int threads, Fork fork) {
    const int64_t tokens = step.tokens;
    for (int64_t i = 0; i < count; i++) {
        const TokenLayer& layer = *layers[i];
        const int64_t width = layer.head_dim, groups = layer.k.rows / width;
        const int64_t outputs = layer.q.rows + layer.k.rows + layer.v.rows;
        std::vector<uint16_t> qkv(size_t(tokens * outputs));
        std::vector<uint16_t> attended(size_t(tokens * layer.q.rows));
        std::vector<uint16_t> normed(size_t(tokens * layer.hidden));
        std::vector<int64_t> ids(size_t(tokens * layer.experts_per_token));
        std::vector<float> routing_weights(ids.size());
        before_attention<Kernels>(layer, step.x, tokens, step.cos, step.sin, qkv.data(), threads,
                                  fork);
        for (int64_t t = 0; t < tokens; t++) {
            const uint16_t* q = qkv.data() + t * outputs;
            const uint16_t *keys = q + layer.q.rows, *values = keys + layer.k.rows;
            TokenAttention attention{q,
                                     keys,
                                     values,
                                     attended.data() + t * layer.q.rows,
                                     layer.q.rows / width,
                                     groups,
                                     width,
                                     1,
                                     width,
                                     0};
            if (step.caches) {
                const TokenCache& cache = step.caches[i * tokens + t];
                store_heads(cache, cache.keys, keys, groups, width);
                store_heads(cache, cache.values, values, groups, width);
                attention.codes = cache.codes;
                attention.keys = cache.keys;
                attention.values = cache.values;
                attention.positions = cache.positions;
                attention.pitch = cache.pitch;
            }
            attend(attention, threads, fork);
        }
        const TokenRoute out{step.x, normed.data(),
                             step.logits + i * tokens * layer.num_experts, ids.data(),
                             routing_weights.data()};
        after_attention<Kernels>(layer, out, tokens, attended.data(), step.x, threads, fork);
    }
}

}  // namespace
