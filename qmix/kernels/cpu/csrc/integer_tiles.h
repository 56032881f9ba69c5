// Tiles of a weight as 16-bit integers, times panels of tokens as 16-bit integers: for prompts.
//
// This file is included by a width (width_avx2.h is one), in a namespace that holds `Width`, what
// the registers do, and `FloatKernels`, the kernels for everything else. A lane is a token and adds
// up the products of a unit, two inputs at a time, which may be twice as many as in float32.
//
// A tile holds the inputs of a row sixteen by sixteen, those of even index before the others: the
// order that unpacking leaves. Codes of 8 bits keep theirs.

struct TileKernels : FloatKernels {
    static constexpr bool INT16_TILES = true;
    static constexpr int64_t SCALE_PITCH = TILE_INPUTS / 16 + MAX_UNITS;
    typedef Width::Floats Floats;
    typedef Width::Ints Ints;
    static constexpr int LANES = Width::BYTES / 4;
    // The most inputs of a unit whose values are not codes themselves: the more products a lane adds
    // up, the fewer bits are left for the inputs.
    static constexpr int64_t TILE_UNIT = 64;

    // The decoded rows of a tile. They stand where a tile of floats would: half of it is enough.
    struct Tile {
        int16_t* values;  // [TILE_ROWS, TILE_PITCH]
        float* scales;    // [TILE_ROWS, SCALE_PITCH], a unit's
        float* shifts;    // what is added, times the total of a unit's inputs
        explicit Tile(float* memory)
            : values(reinterpret_cast<int16_t*>(memory)),
              scales(memory + TILE_ROWS * TILE_PITCH / 2),
              shifts(scales + TILE_ROWS * SCALE_PITCH) {}
    };
    static_assert(2 * SCALE_PITCH <= TILE_PITCH / 2, "a tile, its scales and its shifts");

    // Tokens of a panel.
    struct Panel {
        const int16_t* x;     // [inputs / 2][lanes][2]
        const float* scales;  // [units][lanes], what 1 is worth
        const float* totals;  // [units][lanes], the sums of a unit's inputs
        int64_t lanes;
    };

    static bool takes_tiles(const Matrix& weight, const IntegerTable& table, int64_t unit) {
        return unit >= 16 && (table.linear || shift_of(weight) == NONE);
    }

    // Whether a tile holds the codes' values times the integers of their scales, which is exact, so
    // that a unit has TILE_UNIT inputs in place of the 16 of a group: Q6_K's is. Groups of 32 gain
    // nothing by it.
    static bool folds_scales(const Matrix& weight, const IntegerTable& table) {
        const GroupValues& scales = weight.scales;
        return weight.block == 16 && is_nested(scales) && scales.step != 0 && scales.offset == 0 &&
               table.factor == 1 && shift_of(weight) == NONE &&
               scales.start == __builtin_rintf(scales.start) &&
               scales.step == __builtin_rintf(scales.step) && weight.inputs % TILE_UNIT == 0 &&
               scales.block * weight.block % TILE_UNIT == 0 &&
               float(largest_value(weight, table)) * largest_scale(scales) < 32768;
    }

    // The largest of the integers that are scales but for their outer ones.
    static float largest_scale(const GroupValues& scales) {
        const float last = scales.start + scales.step * (scales.kind == NESTED6 ? 63 : 255);
        const float first = __builtin_fabsf(scales.start);
        return first > __builtin_fabsf(last) ? first : __builtin_fabsf(last);
    }

    // The place of an input in a tile.
    static int64_t place_of(const Matrix& weight, int64_t input) {
        if (read_bits(weight) == 8) return input;
        const int64_t within = input % 16, odd = (within ^ (weight.high_first ? 1 : 0)) % 2;
        return input - within + 8 * odd + within / 2;
    }

    // Quantizes the inputs of a unit for lane `lane` of a panel: as large as 16 bits and the sum of
    // the products, at most 2^31 with weights of up to `most_value`, allow. Not finite: NaN.
    static void quantize_unit(const Matrix& weight, const IntegerTable& table, int32_t most_value,
                              const float* x, int64_t unit, int64_t lanes, int16_t* out,
                              float* scale, float* total) {
        float largest = 0, sum = 0;
        for (int64_t i = 0; i < unit; i++) {
            const float magnitude = x[i] < 0 ? -x[i] : x[i];
            largest = magnitude > largest ? magnitude : largest;
            sum += magnitude * 0x1p-10f;  // finite wherever the inputs are
        }
        // Rounding adds half to each input at most. What is left out is far more than sums of
        // floats err by.
        const float most = 2147483647.f / float(most_value) * 0.999f - float(unit);
        // The largest input becomes an integer, so that inputs which are all alike are exact.
        const float by_sum = __builtin_floorf(most * 0x1p-10f * (largest / sum));
        const float factor = (by_sum < 32767 ? by_sum : 32767) / largest;
        const bool finite = sum - sum == 0, zero = !(factor < 3e38f);
        int32_t sum_of_integers = 0;
        for (int64_t i = 0; i < unit; i++) {
            const int32_t integer =
                !finite || zero ? 0 : int32_t(__builtin_rintf(x[i] * factor));
            const int64_t place = place_of(weight, i);
            out[place / 2 * 2 * lanes + place % 2] = int16_t(integer);
            sum_of_integers += integer;
        }
        const float one = !finite ? __builtin_nanf("") : zero ? 0 : 1 / factor;
        *scale = one / table.factor;
        *total = float(sum_of_integers) * one;
    }

    // The largest magnitude among the values of a tile.
    static int32_t largest_value(const Matrix& weight, const IntegerTable& table) {
        if (read_bits(weight) == 8) {
            const int32_t low = table.values[0], high = low + (1 << weight.bits) - 1;
            return -low > high ? -low : high;
        }
        int32_t largest = 1;
        for (int i = 0; i < 16; i++) {
            const int32_t magnitude = table.values[i] < 0 ? -table.values[i] : table.values[i];
            largest = magnitude > largest ? magnitude : largest;
        }
        return largest;
    }

    // The values of 16 bytes of codes, 32 of 4 bits or 16 of 8.
    struct Decoder {
        __m128i low, high;  // bytes of the table
        int16_t base;
        explicit Decoder(const IntegerTable& table) : base(table.values[0]) {
            alignas(16) uint8_t bytes[2][16];
            for (int i = 0; i < 16; i++) {
                bytes[0][i] = uint8_t(table.values[i]);
                bytes[1][i] = uint8_t(uint16_t(table.values[i]) >> 8);
            }
            low = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0]));
            high = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1]));
        }
        QMIX_INLINE void nibbles(__m128i codes, __m128i* out) const {
            const __m128i nibble = _mm_set1_epi8(15);
            const __m128i even = _mm_and_si128(codes, nibble);
            const __m128i odd = _mm_and_si128(_mm_srli_epi16(codes, 4), nibble);
            const __m128i evens[2] = {_mm_shuffle_epi8(low, even), _mm_shuffle_epi8(high, even)};
            const __m128i odds[2] = {_mm_shuffle_epi8(low, odd), _mm_shuffle_epi8(high, odd)};
            _mm_storeu_si128(out, _mm_unpacklo_epi8(evens[0], evens[1]));
            _mm_storeu_si128(out + 1, _mm_unpacklo_epi8(odds[0], odds[1]));
            _mm_storeu_si128(out + 2, _mm_unpackhi_epi8(evens[0], evens[1]));
            _mm_storeu_si128(out + 3, _mm_unpackhi_epi8(odds[0], odds[1]));
        }
        QMIX_INLINE void bytes(__m128i codes, __m128i* out) const {
            const __m128i least = _mm_set1_epi16(base), zero = _mm_setzero_si128();
            _mm_storeu_si128(out, _mm_add_epi16(_mm_unpacklo_epi8(codes, zero), least));
            _mm_storeu_si128(out + 1, _mm_add_epi16(_mm_unpackhi_epi8(codes, zero), least));
        }
    };

    // Decodes inputs [first, last) of a row, which begin with a chunk, into row `slot` of a tile.
    // Behind the last input of a weight come zeros.
    static void decode_row(const Matrix& weight, const Decoder& decoder, int64_t unit, bool folded,
                           int64_t row, int64_t first, int64_t last, const Scratch& scratch,
                           int64_t slot) {
        const Tile tile(scratch.tile);
        const int64_t stop = last < weight.inputs ? last : weight.inputs;
        float* scales = tile.scales + slot * SCALE_PITCH;
        float* shifts = tile.shifts + slot * SCALE_PITCH;
        const Shift shift = shift_of(weight);
        if (last > stop) {
            memset(scales, 0, sizeof(float) * SCALE_PITCH);
            memset(shifts, 0, sizeof(float) * SCALE_PITCH);
        }
        if (!folded)
            read_scales(weight, unit, row, first / unit, stop / unit, scales,
                        shift == NONE ? nullptr : shifts);
        if (shift == ZEROS)
            for (int64_t u = 0; u < (stop - first) / unit; u++) shifts[u] *= -scales[u];
        const uint8_t* codes = codes_of(weight, row, first, stop, scratch, 0);
        __m128i* out = reinterpret_cast<__m128i*>(tile.values + slot * TILE_PITCH);
        if (read_bits(weight) == 4)
            decode_bytes<4>(decoder, codes, stop - first, out);
        else
            decode_bytes<8>(decoder, codes, stop - first, out);
        if (folded)
            fold_scales(weight, row * weight.inputs + first, stop - first, scales,
                        tile.values + slot * TILE_PITCH);
    }

    // Multiplies values by the integers of their scales, and writes the outer scales of units.
    static void fold_scales(const Matrix& weight, int64_t element, int64_t count, float* scales,
                            int16_t* values) {
        const float one = 1;
        GroupValues inner = weight.scales;
        inner.outer = &one, inner.outer_kind = FLOAT32, inner.block = int64_t(1) << 62;
        float integers[SCALE_PITCH];
        copy_values(inner, element / 16, count / 16, integers);
        // In registers as wide as those that the values were stored from: wider ones would wait.
        __m128i* some = reinterpret_cast<__m128i*>(values);
        for (int64_t g = 0; g < count / 16; g++, some += 2) {
            const __m128i scale = _mm_set1_epi16(int16_t(integers[g]));
            _mm_storeu_si128(some, _mm_mullo_epi16(_mm_loadu_si128(some), scale));
            _mm_storeu_si128(some + 1, _mm_mullo_epi16(_mm_loadu_si128(some + 1), scale));
        }
        for (int64_t u = 0; u < count / TILE_UNIT; u++)
            scales[u] = outer_at(weight.scales,
                                 (element + u * TILE_UNIT) / 16 / weight.scales.block);
    }

    template <int BITS>
    static void decode_bytes(const Decoder& shared, const uint8_t* codes, int64_t count,
                             __m128i* out) {
        const Decoder decoder = shared;  // a copy that can stay in registers
        const auto decode = [&](__m128i some) {
            if constexpr (BITS == 4)
                decoder.nibbles(some, out);
            else
                decoder.bytes(some, out);
            out += 16 / BITS;
        };
        for (; count >= 128 / BITS; count -= 128 / BITS, codes += 16)
            decode(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        if (!count) return;
        uint8_t last[16] = {};
        memcpy(last, codes, count * BITS / 8);
        decode(_mm_loadu_si128(reinterpret_cast<const __m128i*>(last)));
    }

    // The products of a unit [ROWS][VECTORS * LANES]: tile rows [ROWS, unit] times x. Alone, so that
    // no sum leaves its register.
    template <int ROWS, int VECTORS>
    static __attribute__((noinline)) void multiply_unit(const int16_t* values, int64_t unit,
                                                        const int16_t* x, Ints* out) {
        Ints products[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) products[r][v] = Ints{};
        for (const int16_t* end = values + unit; values < end; values += 2) {
            Ints inputs[VECTORS];
            for (int v = 0; v < VECTORS; v++) inputs[v] = Width::load_ints(x + 2 * LANES * v);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const Ints pair = Width::broadcast(values + r * TILE_PITCH);
                for (int v = 0; v < VECTORS; v++)
                    products[r][v] = Width::add_products(products[r][v], pair, inputs[v]);
            }
            x += 2 * VECTORS * LANES;
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) out[VECTORS * r + v] = products[r][v];
    }

    // sums [ROWS][VECTORS * LANES] += rows of a tile times a panel, `units` units of it.
    template <int ROWS, int VECTORS>
    static void multiply_int16_block(const Tile& tile, int64_t row, int64_t unit, int64_t units,
                                     const Panel& panel, bool shifted, float* sums) {
        Ints products[ROWS * VECTORS];
        for (int64_t u = 0; u < units; u++) {
            multiply_unit<ROWS, VECTORS>(tile.values + row * TILE_PITCH + u * unit, unit,
                                         panel.x + u * unit * panel.lanes, products);
            const float* scales = tile.scales + row * SCALE_PITCH + u;
            const float* shifts = tile.shifts + row * SCALE_PITCH + u;
            for (int v = 0; v < VECTORS; v++) {
                const int64_t at = u * panel.lanes + LANES * v;
                const Floats input_scale = Width::load_floats(panel.scales + at);
                const Floats total = Width::load_floats(panel.totals + at);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) {
                    float* sum = sums + LANES * (VECTORS * r + v);
                    const Floats scale = Floats{} + scales[r * SCALE_PITCH];
                    Floats out = Width::load_floats(sum);
                    if (shifted) out = Width::fma(Floats{} + shifts[r * SCALE_PITCH], total, out);
                    out = Width::fma(Width::floats(products[VECTORS * r + v]), scale * input_scale,
                                     out);
                    Width::store_floats(out, sum);
                }
            }
        }
    }

    static void multiply_int16_tile(const Tile& tile, int64_t rows, int64_t unit, int64_t units,
                                    const Panel& panel, bool shifted, float* sums) {
        constexpr int ROWS = Width::TILE_ROWS_AT_ONCE;
        for (int64_t r = 0; r < rows; r += 12)
            if (panel.lanes == LANES)
                multiply_int16_block<12, 1>(tile, r, unit, units, panel, shifted,
                                            sums + LANES * r);
            else
                for (int64_t half = r; half < r + 12; half += ROWS)
                    multiply_int16_block<ROWS, 2>(tile, half, unit, units, panel, shifted,
                                                  sums + 2 * LANES * half);
    }
};
