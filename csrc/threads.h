// The one pool of threads. A job is run by all of them at once (same function, own number); inside
// a job they meet at barriers. Nothing here knows what the job is.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "share.h"

namespace qnext {

class ThreadPool {
 public:
  // `threads` counts the caller: a pool of 2 starts one thread.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Run job(team) on every thread, the caller included; returns when all have finished. Calls from
  // several threads wait for each other.
  void run(const std::function<void(Team&)>& job);

 private:
  void loop(int thread);

  const int threads_;
  Meeting meeting_;
  std::mutex one_job_;
  const std::function<void(Team&)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<bool> stop_{false};
  std::mutex sleep_;
  std::condition_variable wake_;
  int sleepers_ = 0;
  std::vector<std::thread> workers_;
};

}  // namespace qnext
