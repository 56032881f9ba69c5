// Matmuls of prompts on the matrix unit of AMX: tiles of a weight times tiles of tokens, both in
// bfloat16, summed in float32.
//
// A float32 is taken as the sum of two bfloat16, its upper half and what is left of it: 16 bits.
// Activations that are bfloat16 are their upper halves, and then a weight's two halves make two
// products; others have lower halves too, which make a third. Three of four products are summed:
// the lower halves together are below 2^-16 of the product.
//
// A register holds 16 rows of 64 bytes. The unit multiplies a tile of the weight, [16 rows][32
// inputs], by a tile of tokens, [16 pairs of inputs][16 tokens][2]. Any order of the inputs will do
// as long as both have it: that of a decoded chunk, two registers at a time.

#pragma once

#include "matmul.h"
#include "width_avx512.h"

#if defined(__AMX_BF16__)
namespace {
namespace amx {

constexpr int64_t TILE_SIDE = 16;               // rows of a weight, or tokens
constexpr int64_t TILE_WORDS = 16 * TILE_SIDE;  // of 32 bits
constexpr int64_t ROW_BYTES = 64;
constexpr int64_t STEP = 32;                    // inputs of a tile
constexpr int64_t ROWS = 96;                    // of a weight, that a task decodes together
constexpr int64_t DEPTH = 256;  // inputs, likewise: two blocks of rows, 32 KB, fit the first cache
constexpr int64_t BLOCK_WORDS = DEPTH / STEP * 2 * TILE_WORDS;  // of TILE_SIDE decoded rows
constexpr uint32_t UPPER = 0xffff0000;

// The registers of this thread as the kernels use them, and nothing left in them afterwards: the
// system would save it at every switch.
struct Registers {
    Registers() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } configuration;
        static_assert(sizeof configuration == 64, "what the processor reads");
        _tile_loadconfig(&configuration);
    }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
    ~Registers() { _tile_release(); }
};

// A panel of tokens: tiles [steps][blocks], and behind all of them those of the lower halves.
struct TokenTiles {
    const uint32_t* upper;
    const uint32_t* lower;  // null: they are zero
    int64_t blocks;         // of TILE_SIDE tokens
};

// Two registers of a chunk's places, split and joined into pairs: 16 words of two bfloat16.
struct Pairs {
    __m512i upper, lower;
    Pairs(__m512 first, __m512 second) {
        const __m512i mask = _mm512_set1_epi32(int(UPPER));
        const __m512 first_upper = _mm512_and_ps(first, _mm512_castsi512_ps(mask));
        const __m512 second_upper = _mm512_and_ps(second, _mm512_castsi512_ps(mask));
        upper = joined(first, second);
        lower = joined(_mm512_sub_ps(first, first_upper), _mm512_sub_ps(second, second_upper));
    }
    static __m512i joined(__m512 first, __m512 second) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
        return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(second));
    }
};

struct Kernels : avx512::Kernels {
    static constexpr bool BFLOAT16_TILES = true;
    static constexpr int64_t BFLOAT16_ROWS = ROWS;
    // Fewer are multiplied as fast in tiles of integers, where these take the weight: measured.
    static constexpr int64_t BFLOAT16_TOKENS = 96;

    // Writes a panel of tokens as TokenTiles.
    static void arrange_bfloat16(const MatmulPass& pass, int64_t panel, int64_t panel_tokens) {
        const Matrix& weight = pass.matmul->weight;
        const int64_t first = panel * panel_tokens, left = pass.tokens - first;
        const int64_t tokens = left < panel_tokens ? left : panel_tokens;
        const int64_t lanes = left <= panel_tokens ? pass.lanes : panel_tokens;
        const int64_t words = lanes * pass.places() / 2;
        const float* x = pass.matmul->x + (pass.first_token + first) * weight.inputs;
        uint32_t* out = reinterpret_cast<uint32_t*>(pass.arranged + first * pass.places());
        const bool lower = has_lower_halves(x, tokens * weight.inputs);
        pass.input_scales[panel] = lower;
        if (tokens < lanes) memset(out, 0, sizeof(uint32_t) * words * (lower ? 2 : 1));
        for (int64_t c = 0; c < pass.chunks; c++) {
            const int64_t at = c * pass.chunk, rest = weight.inputs - at;
            const size_t bytes = sizeof(float) * (rest < pass.chunk ? rest : pass.chunk);
            for (int64_t t = 0; t < tokens; t++) {
                float values[2 * CHUNK_BYTES] = {};
                memcpy(values, x + t * weight.inputs + at, bytes);
                uint32_t* chunk = out + at / 2 * lanes + t / TILE_SIDE * TILE_WORDS + t % TILE_SIDE;
                place_halves(values, weight, pass.chunk, lanes, chunk);
                if (!lower) continue;
                for (float& value : values) value -= upper_half(value);
                place_halves(values, weight, pass.chunk, lanes, chunk + words);
            }
        }
    }

    static float upper_half(float value) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits &= UPPER;
        memcpy(&value, &bits, 4);
        return value;
    }

    static bool has_lower_halves(const float* x, int64_t count) {
        uint32_t all = 0;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            all |= bits;
        }
        return all & ~UPPER;
    }

    // The upper halves of the chunk of a token in its lane of the tiles, two neighbours a word.
    static void place_halves(const float* values, const Matrix& weight, int64_t chunk,
                             int64_t lanes, uint32_t* out) {
        const int64_t pairs = chunk / STEP;  // of a word of codes
        uint16_t halves[2 * CHUNK_BYTES];
        for (int64_t i = 0; i < chunk; i++) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            halves[i] = uint16_t(bits >> 16);
        }
        for (int64_t word = 0; word < TILE_SIDE; word++)
            for (int64_t p = 0; p < pairs; p++) {
                uint32_t pair;
                memcpy(&pair, halves + 2 * (word * pairs + p), 4);
                if (weight.high_first) pair = pair << 16 | pair >> 16;
                out[p * TILE_SIDE * lanes + word * TILE_SIDE] = pair;
            }
    }

    // Rows [task * ROWS, (task + 1) * ROWS) of a weight times all tokens of a pass.
    static void multiply_bfloat16(const MatmulPass& pass, int64_t task, int64_t panel_tokens,
                                  const Scratch& scratch) {
        const Matrix& weight = pass.matmul->weight;
        const int64_t first = task * ROWS, places = pass.places();
        const int64_t rows = weight.rows - first < ROWS ? weight.rows - first : ROWS;
        const int64_t blocks = round_up(rows, TILE_SIDE) / TILE_SIDE;
        uint32_t* tiles = reinterpret_cast<uint32_t*>(scratch.tile);
        memset(scratch.sums, 0, sizeof(float) * round_up(blocks, 2) * TILE_SIDE * pass.padded);
        const Registers registers;
        for (int64_t at = 0; at < places; at += DEPTH) {
            const int64_t depth = places - at < DEPTH ? places - at : DEPTH;
            for (int64_t block = 0; block < blocks; block += 2) {
                const int64_t start = block * TILE_SIDE, stop = start + 2 * TILE_SIDE;
                for (int64_t r = start; r < (stop < rows ? stop : rows); r++)
                    decode_halves(pass, first + r, at, depth, scratch,
                                  tiles + (r - start) / TILE_SIDE * BLOCK_WORDS +
                                      r % TILE_SIDE * TILE_SIDE);
                for (int64_t t = 0; t < pass.tokens; t += panel_tokens) {
                    const int64_t lanes =
                        t + panel_tokens >= pass.tokens ? pass.lanes : panel_tokens;
                    const uint32_t* upper =
                        reinterpret_cast<const uint32_t*>(pass.arranged + t * places) +
                        at / 2 * lanes;
                    const bool lower = pass.input_scales[t / panel_tokens] != 0;
                    multiply_panel(tiles, depth / STEP,
                                   {upper, lower ? upper + lanes * places / 2 : nullptr,
                                    lanes / TILE_SIDE},
                                   blocks - block > 1,
                                   scratch.sums + (block * pass.padded + 2 * t) * TILE_SIDE);
                }
            }
        }
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t t = 0; t < pass.tokens; t += TILE_SIDE) {
                // A panel has the sums of two blocks of rows, one after the other.
                const int64_t panel = t / panel_tokens * panel_tokens;
                const int64_t lanes = panel + panel_tokens >= pass.tokens ? pass.lanes
                                                                          : panel_tokens;
                const float* sums = scratch.sums +
                                    (block / 2 * 2 * pass.padded + 2 * panel) * TILE_SIDE +
                                    (block % 2 * lanes + t - panel) * TILE_SIDE;
                write_tile(sums, pass, first + block * TILE_SIDE, t);
            }
    }

    // Decodes `depth` inputs of a row from `at` on into its places in tiles [steps][upper, lower].
    static void decode_halves(const MatmulPass& pass, int64_t row, int64_t at, int64_t depth,
                              const Scratch& scratch, uint32_t* out) {
        alignas(64) float values[DEPTH];
        decode<Kernels>(pass.matmul->weight, pass.unit, row, at / pass.chunk,
                        (at + depth) / pass.chunk, scratch, values);
        for (int64_t i = 0; i < depth; i += STEP, out += 2 * TILE_WORDS) {
            const Pairs pairs(_mm512_load_ps(values + i), _mm512_load_ps(values + i + 16));
            _mm512_store_si512(out, pairs.upper);
            _mm512_store_si512(out + TILE_WORDS, pairs.lower);
        }
    }

    static void multiply_panel(const uint32_t* weights, int64_t steps, const TokenTiles& x,
                               bool two_rows, float* sums) {
        const bool two_tokens = x.blocks == 2;
        if (two_rows)
            two_tokens ? multiply_block<2, 2>(weights, steps, x, sums)
                       : multiply_block<2, 1>(weights, steps, x, sums);
        else
            two_tokens ? multiply_block<1, 2>(weights, steps, x, sums)
                       : multiply_block<1, 1>(weights, steps, x, sums);
    }

    // sums [R][T][16][16] += R blocks of rows times T blocks of tokens. Registers: 0 to 3 the sums,
    // 4 and 5 the weights, 6 and 7 the tokens.
    template <int R, int T>
    static __attribute__((noinline)) void multiply_block(const uint32_t* weights, int64_t steps,
                                                         const TokenTiles& x, float* sums) {
        asm volatile("" ::: "memory");  // the loads of tiles do not tell a compiler that they read
        _tile_loadd(0, sums, ROW_BYTES);
        if (T > 1) _tile_loadd(1, sums + TILE_WORDS, ROW_BYTES);
        if (R > 1) _tile_loadd(2, sums + T * TILE_WORDS, ROW_BYTES);
        if (R * T == 4) _tile_loadd(3, sums + 3 * TILE_WORDS, ROW_BYTES);
        const int64_t lower = x.lower ? x.lower - x.upper : 0;
        const uint32_t* tokens = x.upper;
        for (int64_t step = 0; step < steps; step++) {
            load_tokens<T>(tokens);
            multiply<R, T>(weights);
            multiply<R, T>(weights + TILE_WORDS);
            if (lower) {
                load_tokens<T>(tokens + lower);
                multiply<R, T>(weights);
            }
            weights += 2 * TILE_WORDS;
            tokens += T * TILE_WORDS;
        }
        _tile_stored(0, sums, ROW_BYTES);
        if (T > 1) _tile_stored(1, sums + TILE_WORDS, ROW_BYTES);
        if (R > 1) _tile_stored(2, sums + T * TILE_WORDS, ROW_BYTES);
        if (R * T == 4) _tile_stored(3, sums + 3 * TILE_WORDS, ROW_BYTES);
    }

    template <int T>
    static QMIX_INLINE void load_tokens(const uint32_t* tokens) {
        _tile_loadd(6, tokens, ROW_BYTES);
        if (T > 1) _tile_loadd(7, tokens + TILE_WORDS, ROW_BYTES);
    }

    template <int R, int T>
    static QMIX_INLINE void multiply(const uint32_t* weights) {
        _tile_loadd(4, weights, ROW_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        if (T > 1) _tile_dpbf16ps(1, 4, 7);
        if (R > 1) _tile_loadd(5, weights + BLOCK_WORDS, ROW_BYTES);
        if (R > 1) _tile_dpbf16ps(2, 5, 6);
        if (R * T == 4) _tile_dpbf16ps(3, 5, 7);
    }

    // A tile of sums [16 rows][16 tokens] into y, whose rows are tokens.
    static void write_tile(const float* sums, const MatmulPass& pass, int64_t row, int64_t token) {
        const int64_t outputs = pass.matmul->weight.rows;
        const int64_t rows = outputs - row < TILE_SIDE ? outputs - row : TILE_SIDE;
        const __mmask16 mask = __mmask16((1u << rows) - 1);
        const int64_t left = pass.tokens - token, tokens = left < TILE_SIDE ? left : TILE_SIDE;
        const __m512i places = _mm512_mullo_epi32(
            _mm512_set1_epi32(16),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        float* y = pass.matmul->y + (pass.first_token + token) * outputs + row;
        for (int64_t t = 0; t < tokens; t++, y += outputs)
            _mm512_mask_storeu_ps(y, mask, _mm512_i32gather_ps(places, sums + t, 4));
    }
};

}  // namespace amx
}  // namespace
#endif
