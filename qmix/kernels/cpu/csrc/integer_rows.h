// Rows in codes times tokens in 16-bit integers, for a width of registers.
//
// This file is included by a width (width_avx2.h is one), in a namespace that holds `Width`, what the
// registers do, and `OtherKernels`, the kernels for everything else. A chunk is as many registers as
// hold its 64 bytes.

struct Kernels : OtherKernels {
    static constexpr bool INT16 = true;
    static constexpr int REGISTERS = CHUNK_BYTES / Width::BYTES;
    typedef Width::Floats Floats;
    typedef Width::Units Units;
    typedef Width::Register Register;
    typedef Width::Ints Ints;

    // The most tokens that are multiplied row by row.
    static int64_t max_int16_tokens(const Matrix& weight) {
        return Width::max_tokens(read_bits(weight));
    }

    // Whether a table is mapped to codes and a shared base. E2M1's halves are: 0 to 24, and -12.
    static bool maps(const IntegerTable& table) {
        return Width::MAPS_SMALL_TABLES && table.small && !table.linear;
    }

    static bool takes(const Matrix& weight, const IntegerTable& table, int64_t unit) {
        if (in_planes(weight) && shift_of(weight) == ZEROS) return false;
        return table.linear ||
               (shift_of(weight) == NONE && (maps(table) || unit >= Width::TABLE_UNIT));
    }

    // Quantizes `count` inputs of a chunk to 16 bits, arranged as the codes are read, and for a
    // linear table adds them up by units into `totals`. Returns what 1 is worth: NaN if any input
    // is NaN or infinite.
    template <int BITS>
    static float quantize_chunk(const float* x, int64_t count, int32_t high_first,
                                            const IntegerTable& table, int64_t unit, int16_t* out,
                                            float* totals) {
        constexpr int64_t CHUNK = 512 / BITS;
        float inputs[CHUNK] = {};
        memcpy(inputs, x, sizeof(float) * (count < CHUNK ? count : CHUNK));
        uint32_t bits[CHUNK], largest_bits = 0;
        memcpy(bits, inputs, sizeof bits);
        for (int64_t i = 0; i < CHUNK; i++) {
            const uint32_t magnitude = bits[i] & 0x7fffffff;
            largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
        }
        float largest;
        memcpy(&largest, &largest_bits, 4);
        const bool finite = largest_bits < 0x7f800000;
        const bool linear = table.linear || maps(table);
        const float most = linear ? MAX_OF_BYTES : table.max_activation;
        const float factor = largest > 0 ? most / largest : 0;
        if (linear) memset(totals, 0, sizeof(float) * MAX_UNITS);
        if (!finite || factor > 3e38f) {
            memset(out, 0, sizeof(int16_t) * CHUNK);
            return finite ? 0 : __builtin_nanf("");
        }
        int16_t words[CHUNK];
        for (int64_t i = 0; i < CHUNK; i++)
            words[i] = int16_t(int32_t(__builtin_rintf(inputs[i] * factor)));
        if (!linear) {
            Width::arrange_table(words, high_first, out);
            return largest / (most * table.factor);
        }
        for (int64_t i = 0; i < CHUNK; i += 16) {
            int32_t total = 0;
            for (int64_t k = 0; k < 16; k++) total += words[i + k];
            totals[i / unit] += float(total);
        }
        if constexpr (BITS == 4)
            arrange_nibbles(words, high_first, out);
        else
            Width::arrange_bytes(words, out);
        return largest / (most * table.factor);
    }

    // 256 high + low, both signed bytes: for each register the high ones of the codes in the low
    // nibbles and of those in the high nibbles, then the low ones.
    static void arrange_nibbles(const int16_t* words, int32_t high_first,
                                            int16_t* out) {
        constexpr int BYTES = Width::BYTES;
        int8_t* planes = reinterpret_cast<int8_t*>(out);
        for (int r = 0; r < REGISTERS; r++, words += 2 * BYTES, planes += 4 * BYTES)
            for (int odd = 0; odd < 2; odd++) {
                const int16_t* from = words + (high_first ? 1 - odd : odd);
                for (int i = 0; i < BYTES; i++) {
                    planes[BYTES * odd + i] = int8_t((from[2 * i] + 128) >> 8);
                    planes[BYTES * (odd + 2) + i] = int8_t(from[2 * i]);
                }
            }
    }

    // Codes of any table: looked up as 16-bit integers.
    struct TableCodes : Format<4, NONE> {
        static constexpr bool LINEAR = false;
        typedef Width::Values Decoded;
        Width::Table table;
        explicit TableCodes(const IntegerTable& integers) : table(integers) {}
        QMIX_INLINE Decoded decode(Register codes, const uint8_t*) const {
            return Width::lookup(codes, table);
        }
        static QMIX_INLINE Ints dot(const Decoded& values, const int16_t* x) {
            return Width::dot(values, x);
        }
    };

    // Codes of a linear table: as they are, times the bytes of the inputs. Those in planes have their
    // lower bits where codes of 4 bits are.
    template <class Base>
    struct LinearCodes : Base {
        static constexpr bool LINEAR = true;
        static constexpr bool NIBBLES = Base::BITS != 8;
        typedef
            typename std::conditional<NIBBLES, typename Width::Nibbles,
                                          typename Width::Wide>::type Decoded;
        explicit LinearCodes(const IntegerTable&) {}
        QMIX_INLINE Decoded decode(Register codes, const uint8_t* upper) const {
            if constexpr (NIBBLES && Base::BITS > 4)
                return Width::template joined<Base::BITS>(Width::nibbles(codes), upper);
            else if constexpr (NIBBLES)
                return Width::nibbles(codes);
            else
                return Width::wide(codes);
        }
        static QMIX_INLINE Ints dot(const Decoded& codes, const int16_t* x) {
            return Width::dot(codes, x);
        }
    };

    // Codes of a small table: mapped to what they stand for above the lowest value.
    struct MappedCodes : LinearCodes<Format<4, NONE>> {
        typedef LinearCodes<Format<4, NONE>> Plain;
        Register map;
        explicit MappedCodes(const IntegerTable& table) : Plain(table) {
            uint8_t bytes[Width::BYTES];
            for (int i = 0; i < Width::BYTES; i++)
                bytes[i] = uint8_t(table.values[i % 16] - table.lowest);
            map = Width::load(bytes);
        }
        QMIX_INLINE typename Plain::Decoded decode(Register codes, const uint8_t* upper) const {
            return Width::mapped(Plain::decode(codes, upper), map);
        }
    };

    // Adds chunk `c` of a row to its sums. `base` is the value of code 0 of a linear table, for
    // which `offsets` gathers scale * (base - zero) * (the total of the inputs), or bias * total,
    // or, without either, scale * total, which store_rows multiplies by base.
    template <int TOKENS, class Codes>
    QMIX_INLINE static void add_chunk(const uint8_t* source, const uint8_t* upper,
                                                  const Codes& codes,
                                                  const QuantizedInputs& in, int64_t c,
                                                  int64_t chunks, const float* scales,
                                                  const float* shifts, float base,
                                                  const Width::Spread& spread,
                                                  Floats (&sums)[TOKENS],
                                                  Units (&offsets)[TOKENS]) {
        const int64_t pitch = chunks * Codes::CHUNK;
        const int16_t* x = in.x + c * Codes::CHUNK;
        const Units unit_scales = Width::load_units(scales);
        Units scaled[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            const Units input_scale = Units{} + in.scales[t * chunks + c];
            scaled[t] = unit_scales * input_scale;
            if (!Codes::LINEAR) continue;
            Units factors = scaled[t];
            if (Codes::SHIFT == ZEROS)
                factors = factors * ((Units{} + base) - Width::load_units(shifts));
            if (Codes::SHIFT == BIASES) factors = Width::load_units(shifts) * input_scale;
            const float* totals = in.totals + (t * chunks + c) * MAX_UNITS;
            offsets[t] = Width::fma(factors, Width::load_units(totals), offsets[t]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < REGISTERS; r++) {
            const auto decoded = codes.decode(Width::load(source + r * Width::BYTES),
                                              upper + r * Width::BYTES / 4 * Codes::UPPER_BITS);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) {
                const int16_t* inputs = x + t * pitch + r * (Codes::CHUNK / REGISTERS);
                sums[t] = Width::fma(Width::floats(Codes::dot(decoded, inputs)),
                                     spread(scaled[t], r), sums[t]);
            }
        }
    }

    // Multiplies rows [first, end), ROWS at a time, by TOKENS tokens: more rows mean fewer loads of
    // inputs, more tokens fewer look-ups.
    template <int ROWS, int TOKENS, class Codes>
    static void multiply_rows(const Matrix& weight, const Codes& shared, float base,
                                          int64_t unit, const QuantizedInputs in, int64_t first,
                                          int64_t end, const Scratch scratch, float* y) {
        const Codes multiplier = shared;  // a copy that can stay in registers
        constexpr int64_t CHUNK = Codes::CHUNK;
        const Width::Spread spread(unit / Codes::WORD);
        const int64_t chunks = round_up(weight.inputs, CHUNK) / CHUNK, units = CHUNK / unit;
        const int64_t bytes = row_bytes(weight), row_units = weight.inputs / unit;
        constexpr int64_t UPPER_STEP = CHUNK / 8 * Codes::UPPER_BITS;
        constexpr bool PLANES = UPPER_STEP > 0;
        const int64_t pitch = scratch.pitch;
        const int64_t whole = weight.inputs / CHUNK, tail = weight.inputs % CHUNK;
        uint8_t last[ROWS][CHUNK_BYTES] = {}, last_upper[ROWS][CHUNK / 4] = {};
        for (int64_t row = first; row < end; row += ROWS) {
            for (int r = 0; r < ROWS; r++) {
                prefetch_scales(weight, row + r + 8);
                read_scales(weight, unit, row + r, 0, row_units,
                                     scratch.scales + r * pitch,
                                     Codes::SHIFT == NONE ? nullptr : scratch.shifts + r * pitch);
            }
            Floats sums[ROWS][TOKENS];
            Units offsets[ROWS][TOKENS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; t++) sums[r][t] = Floats{}, offsets[r][t] = Units{};
            // First all whole chunks, then a copy of the codes of one that is not: reading on would
            // leave the matrix.
            const uint8_t *codes[ROWS], *upper[ROWS];
            for (int r = 0; r < ROWS; r++) {
                codes[r] = PLANES ? weight.codes + (row + r) * bytes
                                  : codes_of(weight, row + r, 0, weight.inputs, scratch, r);
                upper[r] = PLANES ? upper_of(weight, row + r, 0) : nullptr;
            }
            for (int64_t c = 0, stop = whole; c < chunks; stop = chunks) {
                if (c == whole)
                    for (int r = 0; r < ROWS; r++) {
                        memcpy(last[r], codes[r] + c * CHUNK_BYTES, tail * CHUNK_BYTES / CHUNK);
                        codes[r] = last[r] - c * CHUNK_BYTES;
                        if (!PLANES) continue;
                        memcpy(last_upper[r], upper[r] + c * UPPER_STEP, tail * UPPER_STEP / CHUNK);
                        upper[r] = last_upper[r] - c * UPPER_STEP;
                    }
                for (; c < stop; c++) {
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        const uint8_t* source = codes[r] + c * CHUNK_BYTES;
                        // To the second cache, as in prefetch_codes.
                        __builtin_prefetch(source + ROWS * bytes, 0, 2);
                        const uint8_t* above = upper[r] + c * UPPER_STEP;
                        if (PLANES) __builtin_prefetch(above + ROWS * bytes, 0, 2);
                        const int64_t at = r * pitch + c * units;
                        add_chunk<TOKENS>(source, above, multiplier, in, c, chunks,
                                          scratch.scales + at, scratch.shifts + at, base,
                                          spread, sums[r], offsets[r]);
                    }
                }
            }
            store_rows<Codes::LINEAR && Codes::SHIFT == NONE, Codes::LINEAR>(weight, row, base,
                                                                             sums, offsets, y);
        }
    }

    template <bool SHARED_BASE, bool LINEAR, int ROWS, int TOKENS>
    QMIX_INLINE static void store_rows(const Matrix& weight, int64_t row, float base,
                                                   Floats (&sums)[ROWS][TOKENS],
                                                   Units (&offsets)[ROWS][TOKENS], float* y) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) {
                if (SHARED_BASE) offsets[r][t] = offsets[r][t] * (Units{} + base);
                if (LINEAR) sums[r][t] = Width::add_units(sums[r][t], offsets[r][t]);
                y[t * weight.rows + row + r] = Width::sum(sums[r][t]);
            }
    }

    // All tokens, four at a time where several rows share an input's load. Two or three tokens of
    // codes in planes come one by one: kernels of their own would take a second to compile.
    template <int ROWS, class Codes>
    static void multiply_tokens(const Matrix& weight, const Codes& codes, float base, int64_t unit,
                                QuantizedInputs in, int64_t first, int64_t end,
                                const Scratch& scratch, float* y) {
        const auto multiply = [&](auto kernel) {
            kernel(weight, codes, base, unit, in, first, end, scratch, y);
        };
        const int64_t chunks = round_up(weight.inputs, Codes::CHUNK) / Codes::CHUNK;
        constexpr bool FOUR = ROWS == 2, FEW = FOUR && !Codes::UPPER_BITS;
        for (int64_t left = in.tokens, some; left > 0; left -= some) {
            some = FOUR && left > 4 ? 4 : FOUR && (FEW || left == 4) ? left : 1;
            if (some == 1) multiply(multiply_rows<ROWS, 1, Codes>);
            if constexpr (FEW) {
                if (some == 2) multiply(multiply_rows<ROWS, 2, Codes>);
                if (some == 3) multiply(multiply_rows<ROWS, 3, Codes>);
            }
            if constexpr (FOUR)
                if (some == 4) multiply(multiply_rows<ROWS, 4, Codes>);
            y += some * weight.rows;
            in.x += some * chunks * Codes::CHUNK, in.scales += some * chunks;
            in.totals += some * chunks * MAX_UNITS;
        }
    }

    // y [tokens, rows]: rows [first, end), ROWS at a time, times all quantized tokens.
    template <int ROWS>
    static void multiply_int16(const Matrix& weight, const IntegerTable& table,
                                           int64_t unit, const QuantizedInputs& in, int64_t first,
                                           int64_t end, const Scratch& scratch, float* y) {
        if constexpr (Width::MAPS_SMALL_TABLES)
            if (maps(table))
                return multiply_tokens<ROWS>(weight, MappedCodes(table), table.lowest, unit, in,
                                             first, end, scratch, y);
        if (!table.linear)
            return multiply_tokens<ROWS>(weight, TableCodes(table), 0, unit, in, first, end,
                                         scratch, y);
        with_format(weight, [&](auto format) {
            multiply_tokens<ROWS>(weight, LinearCodes<decltype(format)>(table), table.values[0],
                                  unit, in, first, end, scratch, y);
        });
    }
};
