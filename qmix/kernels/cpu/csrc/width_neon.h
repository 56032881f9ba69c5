// Registers of 16 bytes, for Arm processors with the dot products of bytes (dotprod), and with those
// of unsigned by signed bytes (i8mm). integer_rows.h calls what is here.

#pragma once

#include <type_traits>

#include "int16.h"
#include "portable.h"

#if defined(__ARM_FEATURE_DOTPROD)
namespace {
namespace neon {

typedef Portable FloatKernels;

struct Width {
    static constexpr int BYTES = 16;
    static constexpr int64_t max_tokens(int64_t) { return 12; }  // more go faster as floats
    static constexpr int64_t TABLE_UNIT = 32;
    static constexpr bool MAPS_SMALL_TABLES = true;
    typedef uint8x16_t Register;
    typedef int32x4_t Ints;
    typedef float32x4_t Floats;
    typedef float Units __attribute__((vector_size(32)));

    static QMIX_INLINE Register load(const uint8_t* codes) { return vld1q_u8(codes); }
    static QMIX_INLINE Units load_units(const float* units) {
        Units loaded;
        memcpy(&loaded, units, sizeof loaded);
        return loaded;
    }
    static QMIX_INLINE Floats floats(Ints sums) { return vcvtq_f32_s32(sums); }
    static QMIX_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static QMIX_INLINE Units fma(const Units& a, const Units& b, const Units& c) {
        Floats parts[3][2];
        memcpy(parts[0], &a, sizeof a), memcpy(parts[1], &b, sizeof b);
        memcpy(parts[2], &c, sizeof c);
        for (int i = 0; i < 2; i++) parts[2][i] = fma(parts[0][i], parts[1][i], parts[2][i]);
        Units sums;
        memcpy(&sums, parts[2], sizeof sums);
        return sums;
    }
    static QMIX_INLINE Floats add_units(Floats sums, const Units& units) {
        Floats halves[2];
        memcpy(halves, &units, sizeof units);
        return vaddq_f32(sums, vaddq_f32(halves[0], halves[1]));
    }
    static QMIX_INLINE float sum(Floats sums) { return vaddvq_f32(sums); }

    // A lane is a word of codes, and a unit at least two of them.
    struct Spread {
        int shift;
        explicit Spread(int64_t words) : shift(__builtin_ctzll(words)) {}
        QMIX_INLINE Floats operator()(const Units& units, int r) const {
            return vcombine_f32(vdup_n_f32(units[4 * r >> shift]),
                                vdup_n_f32(units[(4 * r + 2) >> shift]));
        }
    };

    struct Nibbles {
        Register low, high;
    };
    static QMIX_INLINE Nibbles nibbles(Register codes) {
        return {vandq_u8(codes, vdupq_n_u8(15)), vshrq_n_u8(codes, 4)};
    }
    static QMIX_INLINE Ints dot(const Nibbles& codes, const int16_t* x) {
        const int8_t* planes = reinterpret_cast<const int8_t*>(x);
        const int8x16_t first = vreinterpretq_s8_u8(codes.low);
        const int8x16_t second = vreinterpretq_s8_u8(codes.high);
        Ints sums = vdotq_s32(vdupq_n_s32(0), first, vld1q_s8(planes));
        sums = vshlq_n_s32(vdotq_s32(sums, second, vld1q_s8(planes + 16)), 8);
        sums = vdotq_s32(sums, first, vld1q_s8(planes + 32));
        return vdotq_s32(sums, second, vld1q_s8(planes + 48));
    }

    template <int BITS>
    static QMIX_INLINE Nibbles joined(const Nibbles& lower, const uint8_t* upper) {
        if (BITS == 6) {
            const uint16x8_t bits = vmovl_u8(vld1_u8(upper));
            const Register both = vreinterpretq_u8_u16(
                vorrq_u16(vshlq_n_u16(bits, 4), vshlq_n_u16(bits, 8)));
            const Register mask = vdupq_n_u8(0x30);
            return {vorrq_u8(lower.low, vandq_u8(both, mask)),
                    vorrq_u8(lower.high, vandq_u8(vshrq_n_u8(both, 2), mask))};
        }
        uint32_t loaded;
        memcpy(&loaded, upper, 4);
        const Register all = vreinterpretq_u8_u32(vdupq_n_u32(loaded));
        const uint32x4_t words = {0, 0x01010101, 0x02020202, 0x03030303};
        const Register bits = vqtbl1q_u8(all, vreinterpretq_u8_u32(words));
        const Register even = vreinterpretq_u8_u32(vdupq_n_u32(0x40100401));
        const Register odd = vreinterpretq_u8_u32(vdupq_n_u32(0x80200802)), bit = vdupq_n_u8(16);
        return {vorrq_u8(lower.low, vandq_u8(vtstq_u8(bits, even), bit)),
                vorrq_u8(lower.high, vandq_u8(vtstq_u8(bits, odd), bit))};
    }

    static QMIX_INLINE Nibbles mapped(const Nibbles& codes, Register map) {
        return {vqtbl1q_u8(map, codes.low), vqtbl1q_u8(map, codes.high)};
    }

    struct Table {
        uint8x16_t low, high;
        explicit Table(const IntegerTable& table) {
            const int16x8_t first = vld1q_s16(table.values), second = vld1q_s16(table.values + 8);
            low = vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(first), vmovn_s16(second)));
            high = vreinterpretq_u8_s8(
                vcombine_s8(vshrn_n_s16(first, 8), vshrn_n_s16(second, 8)));
        }
    };
    struct Values {
        int16x8_t words[4];
    };
    static QMIX_INLINE Values lookup(Register codes, const Table& table) {
        const Nibbles both = nibbles(codes);
        Values values;
        const Register parts[2] = {both.low, both.high};
        for (int i = 0; i < 2; i++) {
            const uint8x16_t low = vqtbl1q_u8(table.low, parts[i]);
            const uint8x16_t high = vqtbl1q_u8(table.high, parts[i]);
            values.words[2 * i] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
            values.words[2 * i + 1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
        }
        return values;
    }
    static QMIX_INLINE Ints products(Ints sums, int16x8_t values, const int16_t* x) {
        const int16x8_t inputs = vld1q_s16(x);
        sums = vmlal_s16(sums, vget_low_s16(values), vget_low_s16(inputs));
        return vmlal_high_s16(sums, values, inputs);
    }
    static QMIX_INLINE Ints dot(const Values& values, const int16_t* x) {
        Ints sums = vdupq_n_s32(0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums = products(sums, values.words[i], x + 8 * i);
        return sums;
    }

    struct Wide {
        Register codes;
    };
    static QMIX_INLINE Wide wide(Register codes) { return {codes}; }
#if defined(__ARM_FEATURE_MATMUL_INT8)
    static QMIX_INLINE Ints dot(const Wide& wide, const int16_t* x) {
        const int8_t* planes = reinterpret_cast<const int8_t*>(x);
        const Ints sums = vusdotq_s32(vdupq_n_s32(0), wide.codes, vld1q_s8(planes));
        return vusdotq_s32(vshlq_n_s32(sums, 8), wide.codes, vld1q_s8(planes + 16));
    }
    static void arrange_bytes(const int16_t* words, int16_t* out) {
        arrange_planes<BYTES>(words, out);
    }
#else
    static QMIX_INLINE Ints dot(const Wide& wide, const int16_t* x) {
        const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(wide.codes)));
        const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(wide.codes));
        return products(products(vdupq_n_s32(0), low, x), high, x + 8);
    }
    static void arrange_bytes(const int16_t* words, int16_t* out) { memcpy(out, words, 128); }
#endif

    static void arrange_table(const int16_t* words, int32_t high_first, int16_t* out) {
        arrange_unpacked<2, 1>(words, out, high_first);
    }
};

typedef FloatKernels OtherKernels;
#include "integer_rows.h"

}  // namespace neon
}  // namespace
#endif
