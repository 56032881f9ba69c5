// A loop whose items threads share: torch's own, or some that it starts itself.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" {

// libgomp's own entry, so that we share the threads that torch has; null starts threads a call.
typedef void (*Fork)(void (*)(void*), void*, unsigned, unsigned);

}  // extern "C"

namespace {

// Runs `body(item, thread)` for all items, on so many threads.
template <class Body>
struct Loop {
    const Body& body;
    const int64_t items;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};

    static void enter(void* self) {
        Loop& loop = *static_cast<Loop*>(self);
        const int thread = loop.threads++;
        for (int64_t item; (item = loop.next++) < loop.items;) loop.body(item, thread);
    }
};

template <class Body>
void each(int64_t items, int threads, Fork fork, const Body& body) {
    Loop<Body> loop{body, items};
    if (threads > items) threads = int(items);
    if (threads > 1 && fork) {
        fork(Loop<Body>::enter, &loop, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < threads; i++) others.emplace_back(Loop<Body>::enter, &loop);
        } catch (...) {  // fewer threads than were asked for: the work is shared among those there are
        }
        Loop<Body>::enter(&loop);
        for (auto& other : others) other.join();
    }
}

// Below so many products of a weight and an input (30 us on one core) others are not woken up.
constexpr int64_t SERIAL = 1 << 20;

}  // namespace
