// The instruction sets: what a function needs in front of it, and vectors that suit all of them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define QMIX_AVX2 __attribute__((target("avx2,fma,f16c")))
#define QMIX_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define QMIX_VNNI \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#endif

// Functions that are compiled once for each instruction set by being inlined into its wrapper.
#define QMIX_INLINE inline __attribute__((always_inline))

namespace {

// 64 bytes: one register, or as many as a processor needs for them.
typedef uint32_t Words __attribute__((vector_size(64)));

}  // namespace
