// Reads memory and does nothing else: the bound of every matmul of one token.

#pragma once

#include "isa.h"
#include "structs.h"
#include "threads.h"

namespace {

constexpr int64_t READ_BYTES = 1 << 20;  // a task's

// Four streams in the widest loads, prefetched early: the fastest of ten ways to read (34 GB/s,
// where one stream reads 33 and prefetches to the first cache 30).
uint64_t read_once(const uint8_t* source) {
    Words words = {};
    for (int64_t i = 0; i < READ_BYTES / 4; i += 64)
#pragma GCC unroll 4
        for (int stream = 0; stream < 4; stream++) {
            const uint8_t* address = source + stream * (READ_BYTES / 4) + i;
            Words line;
            memcpy(&line, address, sizeof line);
            __builtin_prefetch(address + 8192, 0, 2);
            words ^= line;
        }
    uint64_t lanes[8], all = 0;
    memcpy(lanes, &words, sizeof lanes);
    for (uint64_t lane : lanes) all ^= lane;
    return all;
}

}  // namespace
