// The structures that cross the C interface. qmix/kernels/cpu/ctypes_structs.py mirrors them: the
// same names, the same fields, in the same order, one field a line here so that a test can read
// them.
//
// bfloat16 values are uint16_t. Every pointer stays the caller's.

#pragma once

#include <cstdint>

extern "C" {

enum ValueKind : int32_t {
    FLOAT32 = 0,
    FLOAT16 = 1,
    BFLOAT16 = 2,
    UINT8 = 3,
    NESTED8 = 4,
    NESTED6 = 5
};

// Numbers that groups of elements share: the scales, the zeros or the biases of a matrix.
struct GroupValues {
    const void* values;  // null: there are none; nested: codes, those of six bits four in 3 bytes
    const void* outer;   // nested: value i is map[code] * outer[i / block] + offset
    const float* map;
    int64_t block;
    float start;  // of a map whose value i is start + i * step
    float step;   // 0 of any other map
    float offset;
    int32_t kind;
    int32_t outer_kind;  // FLOAT32 or FLOAT16
};

// A matrix [rows, inputs] in codes as its weight stores it, row after row, the first code in the
// lowest bits. A row of codes of 5 or 6 bits is the lower four of each, then the upper ones. The
// value of an element
// is (table[code] - zero) * scale, or with biases table[code] * scale + bias.
struct Matrix {
    const uint8_t* codes;
    const float* table;  // [16]; a code of more than 4 bits stands for table[0] + code
    GroupValues scales;
    GroupValues zeros;  // without biases only
    GroupValues biases;
    int64_t rows;
    int64_t inputs;
    int64_t block;       // consecutive elements that share a scale
    int32_t bits;        // of a code: 2 to 6 or 8
    int32_t high_first;  // of 4 bits: the first of a byte's two codes is its high nibble
};

// y [tokens, rows] = x [tokens, inputs] W^T, float32 and contiguous.
struct Matmul {
    Matrix weight;
    const float* x;
    float* y;
    int64_t tokens;
    int32_t quantize_activations;  // 16-bit integers may stand for the inputs and the table
};

// y [tokens, rows] = x [tokens, inputs] W^T with a bfloat16 weight; x and y float32, contiguous.
struct DenseMatmul {
    const uint16_t* weight;  // [rows, inputs]
    const float* x;
    float* y;
    int64_t rows;
    int64_t inputs;
    int64_t tokens;
};

// A matrix [2 * byte_rows, inputs] in the packed layout (qmix/weights/packed/layout.py).
struct TiledMatrix {
    const uint8_t* tiles;  // behind the header
    const float* powers;   // [2], multiply the sums of the low and of the high plane
    const float* table;    // [16], the value of each code before the zero is added
    int64_t byte_rows;
    int64_t inputs;
    int64_t tile_inputs;
    int64_t group_inputs;  // 32 or more
    int32_t bits;          // of a code: 4, or 2 and 3 in slices
    int32_t zeros;  // whether tiles hold zeros: 8 minus the zero, to be added to a value
};

// One SwiGLU expert: down(silu(gate x) * (up x)), in float32.
struct ExpertMatrices {
    Matrix gate;
    Matrix up;
    Matrix down;
    const int32_t* gate_perm;  // which input each stored input is; null: stored in their order
    const int32_t* up_perm;
    const int32_t* down_perm;
};

// The weights of a decoder layer that tokens pass.
struct TokenLayer {
    Matrix q;
    Matrix k;
    Matrix v;
    Matrix o;
    const int32_t* perms[4];        // of the inputs of q, k, v and o, as in ExpertMatrices
    const uint16_t* input_norm;     // [hidden]
    const uint16_t* post_norm;      // [hidden]
    const uint16_t* router;         // [num_experts, hidden]
    const ExpertMatrices* experts;  // [num_experts]; null: the caller's task
    int64_t hidden;
    int64_t head_dim;
    int64_t num_experts;
    int64_t experts_per_token;
    float eps;
};

// The tokens of a batch that go through each of several experts.
struct ExpertTokens {
    const int64_t* counts;         // [experts]
    const int64_t* tokens;         // those of the first expert, then those of the second
    const float* routing_weights;  // likewise
};

// What tokens leave behind their attention.
struct TokenRoute {
    uint16_t* residual;      // [tokens, hidden], x plus attention, plus the experts if the layer has them
    uint16_t* normed;        // [tokens, hidden], the experts' input
    uint16_t* logits;        // [tokens, num_experts]
    int64_t* ids;            // [tokens, experts_per_token]
    float* routing_weights;  // [tokens, experts_per_token]
};

// A token's cache in a layer, [groups][slots][head_dim], each group's `pitch` elements apart. Elements
// are bfloat16; or, with `codes`, int8, and a slot holds the codes and the bytes of a float behind
// them, their step: kernels/kv_rows.py.
struct TokenCache {
    void* keys;
    void* values;
    int64_t pitch;
    int64_t slot;       // where the token's keys and values go
    int64_t positions;  // how many slots it attends to, from the first on
    int32_t codes;
};

// One decode step through all layers: one new token of each of several texts.
struct TokenStep {
    const uint16_t* cos;       // [tokens, head_dim]
    const uint16_t* sin;       // [tokens, head_dim]
    const TokenCache* caches;  // [layers][tokens]; null: no position came before these
    uint16_t* x;               // [tokens, hidden], input and output
    uint16_t* logits;          // [layers][tokens][num_experts]
    int64_t tokens;
};

// Attention of one token, in bfloat16; keys and values may be codes.
struct TokenAttention {
    const uint16_t* q;   // [heads, width]
    const void* keys;    // [groups][positions][width], as in TokenCache
    const void* values;  // likewise
    uint16_t* out;       // [heads, width]
    int64_t heads;
    int64_t groups;
    int64_t width;
    int64_t positions;
    int64_t pitch;
    int32_t codes;
};

}  // extern "C"
