// How a kernel learns which part of the work is its own. No standard-library templates here: this
// header is compiled under every instruction set.
#pragma once

#include <stdint.h>

namespace qnext {

// A counter several threads draw from: the next piece of work that nobody has taken.
struct alignas(64) Counter {
  int64_t value = 0;
  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

// Where the threads of a job meet. A counter and a generation word on separate cache lines.
struct Meeting {
  alignas(64) int arrived = 0;
  alignas(64) uint32_t generation = 0;
};

// Memory a thread will read soon. It is asked for while the thread waits for others, so that the
// memory works on.
struct Soon {
  uintptr_t at = 0;
  uintptr_t end = 0;
  void ask(int lines) {
    for (; lines > 0 && at < end; --lines, at += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    }
  }
};

// One thread's place among the threads that run a job.
struct Team {
  int thread = 0;
  int threads = 1;
  Meeting* meeting = nullptr;
  Soon soon;

  // Wait until every thread of the team is here. Everything written before is visible after. In the
  // meantime what is read `soon` is asked for.
  void barrier() {
    if (threads == 1) return;
    const uint32_t now = __atomic_load_n(&meeting->generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&meeting->generation, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&meeting->generation, __ATOMIC_ACQUIRE) == now; ++spins) {
      if (soon.at < soon.end) {
        soon.ask(8);
      } else {
        relax(spins);
      }
    }
  }

  // Spin politely; after a while give the core away, because it may be shared.
  static void relax(int spins);

  // The half-open range of `count` items that is this thread's, cut at multiples of `grain`.
  void range(int64_t count, int64_t grain, int64_t* begin, int64_t* end) const {
    const int64_t pieces = (count + grain - 1) / grain;
    int64_t first = pieces * thread / threads * grain;
    int64_t last = pieces * (thread + 1) / threads * grain;
    *begin = first < count ? first : count;
    *end = last < count ? last : count;
  }
};

}  // namespace qnext
