// What all instruction sets have in common. A library is compiled for one of them (../isa.py).

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Of functions whose arguments are to stay in registers.
#define QMIX_INLINE inline __attribute__((always_inline))

namespace {

// 64 bytes: one register, or as many as a processor needs for them.
typedef uint32_t Words __attribute__((vector_size(64)));

}  // namespace
