// The C interface of the CPU kernels: no state, no exceptions, structures of pointers (structs.h).
// qmix/kernels/cpu/library.py compiles these files at first use and calls them through ctypes.
//
// y = x W^T, with W[n][k] = (table[code] - zero) * scale or code * scale + bias in float32, as the
// weight's `dequantize` defines it. Only the order of the float32 sums is ours. One thread sums a
// row, so the number of threads changes no bit.
//
// Every function ends in the same three arguments: threads, the instruction set, and the entry to
// torch's threads. It returns 0, or 1 if there is no memory for the activations.
//
// Short names: c chunk, t token, r row, e expert, p which four bits of a word, and in attention p
// position and h head.

#include <new>
#include <vector>

#include "bandwidth.h"
#include "bfloat16_tiles.h"
#include "decode_layer.h"
#include "dense.h"
#include "matmul.h"
#include "packed.h"
#include "portable.h"
#include "threads.h"
#include "width_avx2.h"
#include "width_avx512.h"
#include "width_neon.h"

namespace {

template <class Body>
int32_t status_of(const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The kernels of the instruction set that this library is compiled for.
#if defined(__AMX_BF16__)
typedef amx::Kernels Kernels;
#elif defined(__AVX512F__)
typedef avx512::Kernels Kernels;
#elif defined(__AVX2__)
typedef avx2::Kernels Kernels;
#elif defined(__ARM_FEATURE_DOTPROD)
typedef neon::Kernels Kernels;
#else
typedef Portable Kernels;
#endif

}  // namespace

extern "C" {

// The sizes of the structures in structs.h, in their order: what ctypes must agree with.
void qmix_struct_sizes(int64_t* sizes) {
    const size_t structures[] = {sizeof(GroupValues), sizeof(Matrix),        sizeof(Matmul),
                                 sizeof(DenseMatmul), sizeof(TiledMatrix),   sizeof(ExpertMatrices),
                                 sizeof(TokenLayer),  sizeof(ExpertTokens),  sizeof(TokenRoute),
                                 sizeof(TokenCache),  sizeof(TokenStep),     sizeof(TokenAttention)};
    for (size_t size : structures) *sizes++ = int64_t(size);
}

int32_t qmix_matmul(const Matmul* matmuls, int64_t count, int32_t threads, Fork fork) {
    return status_of([&] { multiply_all<Kernels>(matmuls, count, threads, fork); });
}

// y [tokens][2 planes][byte_rows] = x [tokens, inputs] W^T, float32.
int32_t qmix_matmul_packed(const TiledMatrix* packed, const float* x, float* y, int64_t tokens,
                           int32_t threads, Fork fork) {
    const TiledMatrix& matrix = *packed;
    const int64_t inputs = matrix.inputs, rows = matrix.byte_rows;
    const int64_t groups = inputs / matrix.group_inputs;
    IntegerTable table(matrix.table);
    if (table.factor != 1 && matrix.group_inputs > 64)
        table.max_activation = 8191;  // twice as many products a sum
    if (tokens * 2 * rows * inputs < MIN_PARALLEL) threads = 1;
    return status_of([&] {
        std::vector<int16_t> arranged(size_t(tokens * 2 * inputs));
        std::vector<float> scales(size_t(tokens * groups));
        parallel_for(tokens, tokens > 8 ? threads : 1, fork, [&](int64_t t, int) {
            quantize_tiles(matrix, table, x + t * inputs, arranged.data() + t * 2 * inputs,
                           scales.data() + t * groups);
        });
        parallel_for(rows / PANEL, threads, fork, [&](int64_t panel, int) {
            for (int64_t t = 0; t < tokens; t++) {
                float* low = y + 2 * t * rows + panel * PANEL;
                const QuantizedTiles in{arranged.data() + t * 2 * inputs,
                                        scales.data() + t * groups};
                multiply_panel(matrix, table, panel, in, low, low + rows);
            }
        });
    });
}

// A few tokens.
int32_t qmix_matmul_dense(const DenseMatmul* matmul, int32_t threads, Fork fork) {
    const int64_t rows = matmul->rows, inputs = matmul->inputs;
    if (matmul->tokens * rows * inputs < MIN_PARALLEL) threads = 1;
    const int64_t step = (MAX_TASK_BYTES / 4) / (2 * inputs + 1) + 1;
    parallel_for(round_up(rows, step) / step, threads, fork, [&](int64_t task, int) {
        const int64_t last = (task + 1) * step;
        multiply_dense(*matmul, task * step, last < rows ? last : rows);
    });
    return 0;
}

// RMSNorm over the rows of x [rows, width], all in bfloat16.
int32_t qmix_rms_norm(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t rows,
                      int64_t width, float eps, int32_t, Fork) {
    for (int64_t row = 0; row < rows; row++)
        rms_norm(x + row * width, weight, width, eps, y + row * width);
    return 0;
}

// Adds the weighted outputs of experts to y, for the tokens of x that go through them.
int32_t qmix_add_experts(const ExpertMatrices* experts, int64_t count, const ExpertTokens* through,
                         const float* x, float* y, int32_t quantize_activations,
                         int32_t bfloat16_hidden, int32_t threads, Fork fork) {
    return status_of([&] {
        std::vector<ChosenExpert> chosen;
        const int64_t* tokens = through->tokens;
        const float* weights = through->routing_weights;
        for (int64_t e = 0; e < count; e++) {
            const int64_t own = through->counts[e];
            chosen.push_back({experts + e, tokens, weights, own});
            tokens += own;
            weights += own;
        }
        add_experts<Kernels>(chosen, x, y, {quantize_activations, bfloat16_hidden}, threads, fork);
    });
}

int32_t qmix_before_attention(const TokenLayer* layer, const uint16_t* x, int64_t tokens,
                              const uint16_t* cos, const uint16_t* sin, uint16_t* qkv,
                              int32_t threads, Fork fork) {
    return status_of([&] {
        before_attention<Kernels>(*layer, x, tokens, cos, sin, qkv, threads, fork);
    });
}

int32_t qmix_after_attention(const TokenLayer* layer, const TokenRoute* out,
                             const uint16_t* attended, const uint16_t* x, int64_t tokens,
                             int32_t threads, Fork fork) {
    return status_of([&] {
        after_attention<Kernels>(*layer, *out, tokens, attended, x, threads, fork);
    });
}

// For matmuls that may quantize activations.
int32_t qmix_tokens_as_alone(const Matrix* weight, int64_t* tokens, int32_t, Fork) {
    *tokens = tokens_as_alone<Kernels>(*weight);
    return 0;
}

int32_t qmix_decode_tokens(const TokenLayer* const* layers, int64_t count, const TokenStep* step,
                           int32_t threads, Fork fork) {
    return status_of([&] {
        decode_tokens<Kernels>(layers, count, *step, threads, fork);
    });
}

int32_t qmix_attend(const TokenAttention* attention, int32_t threads, Fork fork) {
    return status_of([&] { attend(*attention, threads, fork); });
}

// Rows of codes of x [rows, width], bfloat16.
int32_t qmix_quantize_rows(const uint16_t* x, int8_t* out, int64_t rows, int64_t width,
                           int32_t threads, Fork fork) {
    constexpr int64_t STEP = 64;
    parallel_for(round_up(rows, STEP) / STEP, rows * width < MIN_PARALLEL ? 1 : threads, fork,
                 [&](int64_t task, int) {
                     const int64_t last = (task + 1) * STEP;
                     for (int64_t row = task * STEP; row < (last < rows ? last : rows); row++)
                         quantize_row(x + row * width, width, out + row * CodeRows::size(width));
                 });
    return 0;
}

// Reads [bytes / 64][64] once and xors its words. A part of less than 1 MiB at the end is left out.
int32_t qmix_read(const uint8_t* source, int64_t bytes, uint64_t* out, int32_t threads,
                  Fork fork) {
    std::atomic<uint64_t> words{0};
    parallel_for(bytes / READ_BYTES, threads, fork,
                 [&](int64_t task, int) { words ^= read_once(source + task * READ_BYTES); });
    *out = words;
    return 0;
}

}  // extern "C"
