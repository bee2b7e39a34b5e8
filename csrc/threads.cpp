#include "threads.h"

#include <sched.h>

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qnext {
namespace {

// About 50 microseconds of spinning; after that a waiting thread offers its core to others at every
// turn, and after a while it sleeps. Waking it takes as long as reading a megabyte of weights.
constexpr int kSpins = 2000;
constexpr std::chrono::microseconds kAwake{1000};

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Denormals cost hundreds of cycles on some processors; only our own threads flush them.
void flush_denormals() {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}

}  // namespace

void Team::relax(int spins) {
  pause();
  if (spins > kSpins) sched_yield();
}

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { loop(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    stop_.store(true, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(Team&)>& job) {
  std::lock_guard<std::mutex> lock(one_job_);
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr();
  flush_denormals();
#endif
  job_ = &job;
  running_.store(threads_ - 1, std::memory_order_relaxed);
  bool asleep;
  {
    std::lock_guard<std::mutex> guard(sleep_);
    generation_.fetch_add(1, std::memory_order_release);
    asleep = sleepers_ > 0;
  }
  if (asleep) wake_.notify_all();
  Team team{0, threads_, &meeting_, {}};
  job(team);
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) Team::relax(spins);
#if defined(__x86_64__)
  _mm_setcsr(mode);
#endif
}

void ThreadPool::loop(int thread) {
  flush_denormals();
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    std::chrono::steady_clock::time_point since;
    while (generation_.load(std::memory_order_acquire) == seen) {
      if (stop_.load(std::memory_order_acquire)) return;
      if (++spins < kSpins) {
        pause();
        continue;
      }
      const auto now = std::chrono::steady_clock::now();
      if (spins == kSpins) since = now;
      if (now - since < kAwake) {
        sched_yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep_);
      ++sleepers_;
      wake_.wait(lock, [&] {
        return stop_.load(std::memory_order_relaxed) ||
               generation_.load(std::memory_order_relaxed) != seen;
      });
      --sleepers_;
    }
    seen = generation_.load(std::memory_order_acquire);
    Team team{thread, threads_, &meeting_, {}};
    (*job_)(team);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace qnext
