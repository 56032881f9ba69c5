// Products of 4-bit matrices on a CPU, straight from their standard layouts. A plain C interface, no
// state: qmix/kernels/cpu/library.py compiles these files at first use and calls it through ctypes.
//
// y = x W^T, with W[n][k] = (table[code] - zero) * scale in float32, as the weight's `dequantize`
// defines it; only the order of the float32 sums is ours. A row is summed by one thread, so the number
// of threads changes no bit.
//
// Few tokens are multiplied as the codes are looked up, in registers: those products wait for memory.
// More tokens share tiles of the weight that are decoded into the cache.
//
// Where the caller allows `rounded` products (its inputs and outputs have 16 bits), tokens are multiplied as
// integers instead, on processors with AVX-512 VNNI: inputs as 16 bits by a scale a chunk, the table by one
// scale, integer tables as they are; sums are exact. A product errs by 0.007 % (a bfloat16 output by
// 0.1 %). One token needs a third fewer instructions than with float32, a prompt of 512 is through in 0.55 of the time.
//
// A chunk is 128 inputs of a row: 64 bytes, 16 little-endian words of 8 codes. Shifted right by 4 p,
// the low bits of the words are 16 codes that index a table in registers; so inputs are arranged in
// the order [p][word] within a chunk, and never codes. (Rounded: 32 words of 4 codes; of a table that is the
// codes less a constant, bytes of 2 codes, and the inputs' high and low bytes apart.)

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "avx2.h"
#include "avx512.h"
#include "dense.h"
#include "matrix.h"
#include "packed.h"
#include "bandwidth.h"
#include "portable.h"
#include "threads.h"

namespace {

// Chunks [first, last) of a row as arranged float32.
template <class Kernels>
void decode(const Matrix& m, int64_t size, int64_t row, int64_t first, int64_t last, const Scratch& own, float* out) {
    if (!size) {
        for (int64_t c = first; c < last; c++) look_up_slowly(m, row, c, out + (c - first) * CHUNK);
        return;
    }
    const int64_t units = CHUNK / size, all = m.inputs / size;
    const int64_t end = last * units < all ? last * units : all;
    read_scales<Kernels>(m, size, row, first * units, end, (last - first) * units + 4, own.scales,
                         m.zeros ? own.zeros : nullptr);
    const uint8_t* codes = m.codes + row * (m.inputs / 2);
    for (int64_t c = first; c < last; c++) {
        const uint8_t* from = codes + c * BYTES;
        uint8_t rest[BYTES] = {};
        if ((c + 1) * CHUNK > m.inputs) from = static_cast<uint8_t*>(memcpy(rest, from, m.inputs % CHUNK / 2));
        int64_t at = (c - first) * units;
        Kernels::look_up(m, from, size, own.scales + at, m.zeros ? own.zeros + at : nullptr, out + (c - first) * CHUNK);
    }
}

// One product on its way: tokens [from, from + tokens) of it.
struct Work {
    const Matmul* product;
    int64_t from, tokens, size, chunks, lanes;  // lanes of its last panel; 0: direct
    bool rounded;
    float* arranged;     // direct: [tokens][chunks * CHUNK]; else panels of WIDE tokens, [places][lanes] each
    float* input_scales; // rounded: [tokens][chunks], and `arranged` holds int16
    float* totals;       // rounded: [tokens][chunks][4]
    int64_t items, step;  // runs of `step` rows
};

template <class Kernels>
void arrange_rounded(const Work& work, int64_t token) {
    const Matrix& m = work.product->weight;
    const Integers integers(m.table);
    const float* x = work.product->x + (work.from + token) * m.inputs;
    for (int64_t c = 0, left = m.inputs; c < work.chunks; c++, left -= CHUNK) {
        const int64_t at = token * work.chunks + c;
        work.input_scales[at] =
            Kernels::arrange(x + c * CHUNK, left < CHUNK ? left : CHUNK, m.high_first, integers, work.size,
                             reinterpret_cast<int16_t*>(work.arranged) + at * CHUNK, work.totals + 4 * at);
    }
}

template <class Kernels>
void arrange(const Work& work, int64_t panel, int64_t wide) {
    const Matrix& m = work.product->weight;
    const int64_t places = work.chunks * CHUNK, first = panel * wide;
    const bool direct = !work.lanes;
    const int64_t held = work.tokens - first < wide ? work.tokens - first : wide;
    const int64_t lanes = direct ? 1 : first + wide >= work.tokens ? work.lanes : wide;
    const float* x = work.product->x + (work.from + first) * m.inputs;
    float* to = work.arranged + first * places;
    for (int64_t place = 0; place < places; place++) {
        int64_t input = place / CHUNK * CHUNK + input_at(place % CHUNK, m.high_first);
        for (int64_t t = 0; t < held; t++)
            to[place * lanes + t] = input < m.inputs ? x[t * m.inputs + input] : 0;
        for (int64_t t = held; t < lanes; t++) to[place * lanes + t] = 0;
    }
}

template <class Kernels>
void multiply_rounded(const Work& work, int64_t item, const Scratch& own) {
    const Matrix& m = work.product->weight;
    const Integers integers(m.table);
    const Inputs in{reinterpret_cast<const int16_t*>(work.arranged), work.input_scales, work.totals, work.tokens};
    float* y = work.product->y + work.from * m.rows;
    const int64_t first = item * work.step, end = first + work.step < m.rows ? first + work.step : m.rows;
    const int64_t even = end - (end - first) % (work.tokens == 1 ? ABREAST : ABREAST / 2);
    if (work.tokens == 1) Kernels::template rounded<ABREAST>(m, integers, work.size, in, first, even, own, y);
    else Kernels::template rounded<ABREAST / 2>(m, integers, work.size, in, first, even, own, y);
    Kernels::template rounded<1>(m, integers, work.size, in, even, end, own, y);
}

template <class Kernels>
void multiply_direct(const Work& work, int64_t item, const Scratch& own) {
    const Matrix& m = work.product->weight;
    const int64_t places = work.chunks * CHUNK, end = (item + 1) * work.step < m.rows ? (item + 1) * work.step : m.rows;
    float* y = work.product->y + work.from * m.rows;
    for (int64_t row = item * work.step; row < end; row++) {
        if (work.size) {
            const int64_t all = m.inputs / work.size;
            scales_ahead(m, row + 8);
            read_scales<Kernels>(m, work.size, row, 0, all, all + 8, own.scales, m.zeros ? own.zeros : nullptr);
            Kernels::direct(m, work.arranged, places, work.tokens, row, work.size, own, y);
            continue;
        }
        float sums[DIRECT] = {}, values[CHUNK];
        for (int64_t c = 0; c < work.chunks; c++) {
            look_up_slowly(m, row, c, values);
            for (int64_t t = 0; t < work.tokens; t++) {
                const float* x = work.arranged + t * places + c * CHUNK;
                for (int64_t i = 0; i < CHUNK; i++) sums[t] += values[i] * x[i];
            }
        }
        for (int64_t t = 0; t < work.tokens; t++) y[t * m.rows + row] = sums[t];
    }
}

template <class Kernels>
void multiply_tile(const Work& work, int64_t item, const Scratch& own, int64_t wide) {
    const Matrix& m = work.product->weight;
    const int64_t first = item * ROWS, rows = m.rows - first < ROWS ? m.rows - first : ROWS;
    const int64_t padded = up(rows, 12), places = work.chunks * CHUNK;
    memset(own.sums, 0, sizeof(float) * ROWS * up(work.tokens, wide));
    if (padded > rows) memset(own.tile + rows * PITCH, 0, sizeof(float) * (padded - rows) * PITCH);
    for (int64_t at = 0; at < places; at += DEPTH) {
        const int64_t depth = places - at < DEPTH ? places - at : DEPTH;
        for (int64_t r = 0; r < rows; r++)
            decode<Kernels>(m, work.size, first + r, at / CHUNK, (at + depth) / CHUNK, own, own.tile + r * PITCH);
        for (int64_t t = 0; t < work.tokens; t += wide) {
            const int64_t lanes = t + wide >= work.tokens ? work.lanes : wide;
            Kernels::tile(own.tile, padded, depth, work.arranged + t * places + at * lanes, lanes, own.sums + t * ROWS);
        }
    }
    float* y = work.product->y + work.from * m.rows + first;
    for (int64_t t = 0; t < work.tokens; t++) {
        const int64_t panel = t / wide * wide, lanes = panel + wide >= work.tokens ? work.lanes : wide;
        const float* sums = own.sums + panel * ROWS + t % wide;
        for (int64_t r = 0; r < rows; r++) y[t * m.rows + r] = sums[r * lanes];
    }
}

template <class Kernels>
void multiply(const Matmul* products, int64_t count, int threads, Fork fork) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) all += products[i].tokens * products[i].weight.rows * products[i].weight.inputs;
    if (all < SERIAL) threads = 1;
    const int64_t wide = Kernels::lanes(TOKENS);
    std::vector<Work> works;
    int64_t floats = 0, units = 0, sums = 0;
    for (int64_t i = 0; i < count; i++) {
        const Matrix& m = products[i].weight;
        const int64_t size = unit(m);
        const bool rounded = Kernels::INTEGERS && size && products[i].rounded && (!m.zeros || Integers(m.table).linear);
        const int64_t most = rounded ? ROUNDED : TOKENS;
        for (int64_t from = 0; from < products[i].tokens; from += most) {
            Work work{};
            work.product = products + i;
            work.from = from;
            work.tokens = products[i].tokens - from < most ? products[i].tokens - from : most;
            work.size = size;
            work.chunks = up(m.inputs, CHUNK) / CHUNK;
            work.rounded = rounded;
            if (work.tokens > DIRECT && !work.rounded) {
                work.lanes = Kernels::lanes((work.tokens - 1) % wide + 1);
                work.step = ROWS;
            } else {
                int64_t bytes = m.rows * m.inputs / 2 / (16 * threads);
                bytes = bytes > MOST_BYTES ? MOST_BYTES : bytes < LEAST_BYTES ? LEAST_BYTES : bytes;
                work.step = up(bytes / (m.inputs / 2 + 1) + 1, ABREAST);
            }
            work.items = up(m.rows, work.step) / work.step;
            floats += up(work.tokens, work.lanes ? wide : 1) * work.chunks * CHUNK;
            if (work.rounded) floats += up(5 * work.tokens * work.chunks, 16);
            if (work.lanes && sums < ROWS * up(work.tokens, wide)) sums = ROWS * up(work.tokens, wide);
            if (work.size && units < m.inputs / work.size) units = m.inputs / work.size;
            works.push_back(work);
        }
    }
    // Cache lines of its own for every thread.
    const int64_t of_scales = up(units + 16, 16), of_tile = sums ? ROWS * PITCH : 0;
    const int64_t own = 2 * ABREAST * of_scales + of_tile + sums;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(float) * size_t(floats + threads * own + 16))) throw std::bad_alloc();
    float* arranged = static_cast<float*>(memory);
    float* scratch = arranged + up(floats, 16);

    struct Panel { const Work* work; int64_t index; };
    std::vector<Panel> panels;
    int64_t items = 0, arranged_floats = 0;
    for (size_t i = 0; i < works.size(); i++) {
        Work& work = works[i];
        const Matmul& now = *work.product;
        const Work* before = i ? &works[i - 1] : nullptr;
        items += work.items;
        if (before && before->product->x == now.x && before->from == work.from && before->tokens == work.tokens
            && before->product->weight.inputs == now.weight.inputs
            && before->rounded == work.rounded && (!work.rounded || before->size == work.size)
            && before->product->weight.high_first == now.weight.high_first
            && (!work.rounded || !memcmp(before->product->weight.table, now.weight.table, 16 * sizeof(float)))) {
            work.arranged = before->arranged;
            work.input_scales = before->input_scales;
            work.totals = before->totals;
            continue;
        }
        const int64_t panel = work.lanes ? wide : 1;
        work.arranged = arranged;
        arranged += up(work.tokens, panel) * work.chunks * CHUNK;
        if (work.rounded) {
            work.input_scales = arranged;
            work.totals = arranged + work.tokens * work.chunks;
            arranged += up(5 * work.tokens * work.chunks, 16);
        }
        arranged_floats += work.tokens * work.chunks * CHUNK;
        for (int64_t p = 0; p * panel < work.tokens; p++) panels.push_back({&work, p});
    }
    auto bring = [&](int64_t i, int) {
        const Work& work = *panels[i].work;
        if constexpr (Kernels::INTEGERS)
            if (work.rounded) return arrange_rounded<Kernels>(work, panels[i].index);
        arrange<Kernels>(work, panels[i].index, work.lanes ? wide : 1);
    };
    each(int64_t(panels.size()), arranged_floats > (1 << 16) ? threads : 1, fork, bring);
    each(items, threads, fork, [&](int64_t item, int thread) {
        const Work* work = works.data();
        while (item >= work->items) item -= work++->items;
        float* mine = scratch + thread * own;
        float* tile = mine + 2 * ABREAST * of_scales;
        const Scratch part{mine, mine + ABREAST * of_scales, tile, tile + of_tile, of_scales};
        if constexpr (Kernels::INTEGERS)
            if (work->rounded) return multiply_rounded<Kernels>(*work, item, part);
        if (work->lanes) multiply_tile<Kernels>(*work, item, part, wide);
        else multiply_direct<Kernels>(*work, item, part);
    });
    free(memory);
}

// Runs `body` with the kernels of an instruction set; 0, or 1 without memory.
template <class Body>
int32_t with_isa(int32_t isa, const Body& body) {
    try {
#if defined(__x86_64__)
        if (isa == VNNI) return body(Vnni{}), 0;
        if (isa == AVX512) return body(Avx512{}), 0;
        if (isa == AVX2) return body(Avx2{}), 0;
#endif
        body(Portable{});
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

#include "decode_layer.h"

extern "C" {

// The best instruction set that this processor has.
int32_t qmix_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")
        || !__builtin_cpu_supports("f16c"))
        return PORTABLE;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                      && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!wide) return AVX2;
    return __builtin_cpu_supports("avx512vnni") ? VNNI : AVX512;
#else
    return PORTABLE;
#endif
}

// 0, or 1 without memory for the arranged inputs.
int32_t qmix_matmul(const Matmul* products, int64_t count, int32_t threads, int32_t isa, Fork fork) {
    return with_isa(isa, [&](auto kernels) { multiply<decltype(kernels)>(products, count, threads, fork); });
}

// The products' sizes are those of the first expert; y is added to. 0, or 1 without memory.
int32_t qmix_moe_token(const MixedExpert* experts, int64_t count, const float* x, float* y, int32_t rounded,
                     int32_t threads, int32_t isa, Fork fork) {
    return with_isa(isa, [&](auto kernels) { mixture<decltype(kernels)>(experts, count, x, y, rounded, threads, fork); });
}

// The layer of one token before its attention: `qkv` is queries and keys, rotated, and values.
int32_t qmix_before_attention(const TokenLayer* layer, const uint16_t* x, const uint16_t* cos, const uint16_t* sin,
                              uint16_t* qkv, int32_t threads, int32_t isa, Fork fork) {
    return with_isa(isa, [&](auto kernels) { before_attention<decltype(kernels)>(*layer, x, cos, sin, qkv, threads, isa, fork); });
}

// And after it: to the router's choice, or to the end if the experts are there too.
int32_t qmix_after_attention(const TokenLayer* layer, const TokenRoute* to, const uint16_t* attended,
                             const uint16_t* x, int32_t threads, int32_t isa, Fork fork) {
    return with_isa(isa, [&](auto kernels) { after_attention<decltype(kernels)>(*layer, *to, attended, x, threads, isa, fork); });
}

// One token through all of several layers, whose experts must be there.
int32_t qmix_decode_token(const TokenLayer* const* layers, int64_t count, const TokenStep* step, int32_t threads, int32_t isa,
                   Fork fork) {
    return with_isa(isa, [&](auto kernels) { token<decltype(kernels)>(layers, count, *step, threads, isa, fork); });
}

// Attention alone.
int32_t qmix_attend(const Attended* attended, int32_t threads, int32_t isa, Fork fork) {
    try {
        attend(*attended, threads, isa, fork);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// y [tokens][2 planes][byte_rows] = x [tokens, inputs] W^T, as qmix_matmul.
int32_t qmix_matmul_packed(const Packed* matrix, const float* x, float* y, int64_t tokens, int32_t threads,
                             int32_t isa, Fork fork) {
    const Packed& m = *matrix;
    const int64_t tiles = m.inputs / m.tile_inputs, panels = m.byte_rows / PANEL;
    Integers integers(m.table);
    if (integers.by != 1 && m.tile_inputs > 64) integers.largest_input = 8191;  // twice as many products a sum
    if (tokens * 2 * m.byte_rows * m.inputs < SERIAL) threads = 1;
    try {
        std::vector<int16_t> arranged(size_t(tokens * 2 * m.inputs));
        std::vector<float> scales(size_t(tokens * tiles));
        each(tokens, tokens > 8 ? threads : 1, fork, [&](int64_t t, int) {
            arrange_packed(m, integers, x + t * m.inputs, arranged.data() + t * 2 * m.inputs,
                           scales.data() + t * tiles);
        });
        each(panels, threads, fork, [&](int64_t panel, int) {
            for (int64_t t = 0; t < tokens; t++) {
                float* low = y + 2 * t * m.byte_rows + panel * PANEL;
                const PackedInputs in{arranged.data() + t * 2 * m.inputs, scales.data() + t * tiles};
                packed_panel(m, integers, isa, panel, in, low, low + m.byte_rows);
            }
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Of one or two tokens.
void qmix_matmul_dense(const DenseMatmul* product, int32_t threads, int32_t isa, Fork fork) {
    const DenseMatmul& d = *product;
    if (d.tokens * d.rows * d.inputs < SERIAL) threads = 1;
    const int64_t step = (MOST_BYTES / 4) / (2 * d.inputs + 1) + 1, items = up(d.rows, step) / step;
    each(items, threads, fork, [&](int64_t item, int) {
        dense_rows(d, isa, item * step, (item + 1) * step < d.rows ? (item + 1) * step : d.rows);
    });
}

// RMSNorm over the rows of x [rows, width], all in bfloat16.
void qmix_rms_norm(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t rows, int64_t width, float eps,
                   int32_t isa) {
    for (int64_t row = 0; row < rows; row++) norm(x + row * width, weight, width, eps, isa, y + row * width);
}

}  // extern "C"
