// A loop whose tasks threads share: torch's own threads, or threads that it starts itself.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" {

// The entry of libgomp, so that torch's threads are used; null starts new threads for each call.
typedef void (*Fork)(void (*)(void*), void*, unsigned, unsigned);

}  // extern "C"

namespace {

// Calls `body(task, thread)` for every task.
template <class Body>
struct Loop {
    const Body& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};

    static void enter(void* self) {
        Loop& loop = *static_cast<Loop*>(self);
        const int thread = loop.threads++;
        for (int64_t task; (task = loop.next++) < loop.tasks;) loop.body(task, thread);
    }
};

template <class Body>
void parallel_for(int64_t tasks, int threads, Fork fork, const Body& body) {
    Loop<Body> loop{body, tasks};
    if (threads > tasks) threads = int(tasks);
    if (threads > 1 && fork) {
        fork(Loop<Body>::enter, &loop, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < threads; i++) others.emplace_back(Loop<Body>::enter, &loop);
        } catch (...) {  // the threads that did start share all the tasks
        }
        Loop<Body>::enter(&loop);
        for (auto& other : others) other.join();
    }
}

// Below this many multiplications (30 us on one core) no other thread is woken.
constexpr int64_t MIN_PARALLEL = 1 << 20;

}  // namespace
