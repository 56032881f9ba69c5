// Memory read once and for nothing else: the bound of every product of one token.

#pragma once

#include "matrix.h"
#include "threads.h"

namespace {

constexpr int64_t PLAIN_BYTES = 1 << 20;

// In the widest loads, four streams, asked for early: of ten ways to read the fastest (34 GB/s where one stream
// reads 33 and prefetches to the first cache 30).
inline __attribute__((always_inline)) uint64_t plain_words(const uint8_t* from) {
    Words found = {};
    for (int64_t i = 0; i < PLAIN_BYTES / 4; i += 64)
#pragma GCC unroll 4
        for (int stream = 0; stream < 4; stream++) {
            const uint8_t* at = from + stream * (PLAIN_BYTES / 4) + i;
            Words line;
            memcpy(&line, at, sizeof line);
            __builtin_prefetch(at + 8192, 0, 2);
            found ^= line;
        }
    uint64_t words[8], all = 0;
    memcpy(words, &found, sizeof words);
    for (uint64_t each : words) all ^= each;
    return all;
}

#if defined(__x86_64__)
QMIX_AVX2 uint64_t plain_avx2(const uint8_t* from) { return plain_words(from); }
QMIX_AVX512 uint64_t plain_avx512(const uint8_t* from) { return plain_words(from); }
#endif

uint64_t plain_read(const uint8_t* from, int32_t isa) {
#if defined(__x86_64__)
    if (isa >= AVX512) return plain_avx512(from);
    if (isa == AVX2) return plain_avx2(from);
#endif
    (void)isa;
    return plain_words(from);
}

}  // namespace

// Reads all of [bytes / 64][64] once; the xor of its words. A part of less than 1 MiB at the end is left out.
extern "C" uint64_t qmix_read(const uint8_t* from, int64_t bytes, int32_t threads, int32_t isa, Fork fork) {
    std::atomic<uint64_t> all{0};
    each(bytes / PLAIN_BYTES, threads, fork, [&](int64_t item, int) {
        all ^= plain_read(from + item * PLAIN_BYTES, isa);
    });
    return all;
}
