// One token through layers: what torch's operations take a fifth of the time for, because the weights that
// pass in between leave nothing of them in a cache. Included after `multiply`.
//
// Values between operations are bfloat16, rounded where torch rounds them, but within an expert float32.

#pragma once

#include "attention.h"

extern "C" {

struct MixedExpert {            // y += share * down(silu(gate x) * (up x)) of one token, all in float32
    Matrix gate, up, down;
    const int64_t *gate_perm, *up_perm, *down_perm;  // which input each of the weight's is; null: in their order
    float share;
};

struct TokenLayer {
    Matrix q, k, v, o;
    const int64_t* perms[4];    // of their inputs, as in MixedExpert
    const uint16_t *input_norm, *post_norm;  // [hidden]
    const uint16_t* router;     // [experts, hidden]
    const MixedExpert* mixed;   // [experts], of any share; null: their products are the caller's
    int64_t hidden, head_dim, experts, chosen;
    float eps;
};

struct TokenRoute {
    uint16_t* residual;         // [hidden], x and what attention added, and the experts if they are ours
    uint16_t* normed;           // [hidden], what the experts take
    uint16_t* logits;           // [experts]
    int64_t* ids;               // [chosen]
    float* shares;              // [chosen]
};

struct TokenCache {             // [groups][slots][head_dim], each group's `pitch` elements apart
    uint16_t *keys, *values;
    int64_t pitch;
};

struct TokenStep {
    const uint16_t *cos, *sin;  // [head_dim]
    const TokenCache* caches;   // a layer's each; null: nothing was before this token
    int64_t slot, positions;    // where this token's keys lie, and how many it sees, from the first slot on
    uint16_t* x;                // [hidden], in and out
    uint16_t* logits;           // [layers][experts]
};

}  // extern "C"

namespace {

// The inputs of a product, in the order that its weight stores them.
inline const float* ordered(const float* x, int64_t count, const int64_t* perm, std::vector<float>& to) {
    if (!perm) return x;
    to.resize(size_t(count));
    for (int64_t i = 0; i < count; i++) to[i] = x[perm[i]];
    return to.data();
}

template <class Kernels>
void mixture(const MixedExpert* experts, int64_t count, const float* x, float* y, int32_t rounded, int threads, Fork fork) {
    constexpr int64_t STEP = 2048;
    const int64_t inputs = experts->gate.inputs, width = experts->gate.rows, outputs = experts->down.rows;
    const int64_t steps = up(width, STEP) / STEP;
    std::vector<float> values(size_t(count * (3 * width + outputs)));
    std::vector<std::vector<float>> moved(size_t(2 * count));
    float* hidden = values.data() + 2 * count * width;
    float* downs = hidden + count * width;
    std::vector<Matmul> products;
    for (int64_t e = 0; e < count; e++) {
        float* gate = values.data() + 2 * e * width;
        products.push_back({experts[e].gate, ordered(x, inputs, experts[e].gate_perm, moved[2 * e]), gate, 1, rounded});
        products.push_back({experts[e].up, ordered(x, inputs, experts[e].up_perm, moved[2 * e + 1]), gate + width, 1, rounded});
    }
    multiply<Kernels>(products.data(), 2 * count, threads, fork);
    each(count * steps, threads, fork, [&](int64_t item, int) {
        const int64_t e = item / steps, from = item % steps * STEP, held = width - from < STEP ? width - from : STEP;
        const float* gate = values.data() + 2 * e * width + from;
        Kernels::gated(gate, gate + width, held, hidden + e * width + from);
    });
    products.clear();
    for (int64_t e = 0; e < count; e++)
        products.push_back({experts[e].down, ordered(hidden + e * width, width, experts[e].down_perm, moved[e]),
                            downs + e * outputs, 1, rounded});
    multiply<Kernels>(products.data(), count, threads, fork);
    for (int64_t e = 0; e < count; e++)
        for (int64_t i = 0; i < outputs; i++) y[i] += experts[e].share * downs[e * outputs + i];
}

template <class Kernels>
void before_attention(const TokenLayer& l, const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* qkv,
                      int threads, int32_t isa, Fork fork) {
    const int64_t rotated = l.q.rows + l.k.rows, all = rotated + l.v.rows, d = l.head_dim;
    std::vector<uint16_t> normed(l.hidden);
    norm(x, l.input_norm, l.hidden, l.eps, isa, normed.data());
    std::vector<float> inputs(l.hidden), out(all), moved[3];
    for (int64_t i = 0; i < l.hidden; i++) inputs[i] = widened(normed[i]);
    const Matmul products[3] = {
        {l.q, ordered(inputs.data(), l.hidden, l.perms[0], moved[0]), out.data(), 1, 1},
        {l.k, ordered(inputs.data(), l.hidden, l.perms[1], moved[1]), out.data() + l.q.rows, 1, 1},
        {l.v, ordered(inputs.data(), l.hidden, l.perms[2], moved[2]), out.data() + rotated, 1, 1},
    };
    multiply<Kernels>(products, 3, threads, fork);
    for (float& each : out) each = widened(rounded_to_even(each));
    for (int64_t head = 0; head < rotated; head += d)
        for (int64_t i = 0; i < d; i++) {
            const float other = i < d / 2 ? -out[head + i + d / 2] : out[head + i - d / 2];
            const float sum = widened(rounded_to_even(out[head + i] * widened(cos[i])))
                              + widened(rounded_to_even(other * widened(sin[i])));
            qkv[head + i] = rounded_to_even(sum);
        }
    for (int64_t i = rotated; i < all; i++) qkv[i] = rounded_to_even(out[i]);
}

// Softmax in float32, the largest so many, their shares summing to 1. Among equals the choice is that of
// torch.topk, which sorts by the same functions: a prompt, which torch routes, takes the same experts.
inline void choose(const uint16_t* logits, int64_t experts, int64_t chosen, int64_t* ids, float* shares) {
    typedef std::pair<float, int64_t> Entry;
    std::vector<Entry> entries(experts);
    float most = widened(logits[0]), sum = 0, of_chosen = 0;
    for (int64_t e = 1; e < experts; e++) most = widened(logits[e]) > most ? widened(logits[e]) : most;
    for (int64_t e = 0; e < experts; e++) {
        entries[e] = {__builtin_expf(widened(logits[e]) - most), e};
        sum += entries[e].first;
    }
    for (Entry& entry : entries) entry.first /= sum;
    const auto before = [](const Entry& a, const Entry& b) {
        return (a.first != a.first && b.first == b.first) || a.first > b.first;
    };
    const auto first = entries.begin(), last = first + chosen;
    if (chosen * 64 <= experts) {
        std::partial_sort(first, last, entries.end(), before);
    } else {
        std::nth_element(first, last - 1, entries.end(), before);
        std::sort(first, last - 1, before);
    }
    for (int64_t i = 0; i < chosen; i++) {
        ids[i] = entries[i].second;
        of_chosen += shares[i] = entries[i].first;
    }
    for (int64_t i = 0; i < chosen; i++) shares[i] /= of_chosen;
}

template <class Kernels>
void after_attention(const TokenLayer& l, const TokenRoute& to, const uint16_t* attended, const uint16_t* x,
                     int threads, int32_t isa, Fork fork) {
    std::vector<float> inputs(l.o.inputs), out(l.hidden), moved, logits(l.experts);
    for (int64_t i = 0; i < l.o.inputs; i++) inputs[i] = widened(attended[i]);
    const Matmul product{l.o, ordered(inputs.data(), l.o.inputs, l.perms[3], moved), out.data(), 1, 1};
    multiply<Kernels>(&product, 1, threads, fork);
    for (int64_t i = 0; i < l.hidden; i++)
        to.residual[i] = rounded_to_even(widened(x[i]) + widened(rounded_to_even(out[i])));
    norm(to.residual, l.post_norm, l.hidden, l.eps, isa, to.normed);
    for (int64_t i = 0; i < l.hidden; i++) out[i] = widened(to.normed[i]);
    dense_rows({l.router, out.data(), logits.data(), l.experts, l.hidden, 1}, isa, 0, l.experts);
    for (int64_t e = 0; e < l.experts; e++) to.logits[e] = rounded_to_even(logits[e]);
    choose(to.logits, l.experts, l.chosen, to.ids, to.shares);
    if (!l.mixed) return;
    std::vector<MixedExpert> mixed;
    for (int64_t e = 0; e < l.experts; e++)  // summed in ascending order
        for (int64_t i = 0; i < l.chosen; i++)
            if (to.ids[i] == e) {
                mixed.push_back(l.mixed[e]);
                mixed.back().share = to.shares[i];
            }
    std::vector<float> sum(l.hidden);
    mixture<Kernels>(mixed.data(), l.chosen, out.data(), sum.data(), 1, threads, fork);
    for (int64_t i = 0; i < l.hidden; i++)
        to.residual[i] = rounded_to_even(widened(to.residual[i]) + widened(rounded_to_even(sum[i])));
}

// All of several layers, their experts included.
template <class Kernels>
void token(const TokenLayer* const* layers, int64_t count, const TokenStep& step, int threads, int32_t isa, Fork fork) {
    for (int64_t i = 0; i < count; i++) {
        const TokenLayer& l = *layers[i];
        const int64_t d = l.head_dim, groups = l.k.rows / d;
        std::vector<uint16_t> qkv(l.q.rows + l.k.rows + l.v.rows), attended(l.q.rows), normed(l.hidden);
        std::vector<int64_t> ids(l.chosen);
        std::vector<float> shares(l.chosen);
        before_attention<Kernels>(l, step.x, step.cos, step.sin, qkv.data(), threads, isa, fork);
        const uint16_t *keys = qkv.data() + l.q.rows, *values = keys + l.k.rows;
        Attended heads{qkv.data(), keys, values, attended.data(), l.q.rows / d, groups, d, step.positions, d};
        if (step.caches) {
            const TokenCache& cache = step.caches[i];
            for (int64_t g = 0; g < groups; g++) {
                memcpy(cache.keys + g * cache.pitch + step.slot * d, keys + g * d, sizeof(uint16_t) * d);
                memcpy(cache.values + g * cache.pitch + step.slot * d, values + g * d, sizeof(uint16_t) * d);
            }
            heads.keys = cache.keys;
            heads.values = cache.values;
            heads.pitch = cache.pitch;
        }
        attend(heads, threads, isa, fork);
        const TokenRoute to{step.x, normed.data(), step.logits + i * l.experts, ids.data(), shares.data()};
        after_attention<Kernels>(l, to, attended.data(), step.x, threads, isa, fork);
    }
}

}  // namespace
