// Measuring the machine on the spot: what a share of the limit is a share of.
#include <atomic>
#include <chrono>
#include <vector>

#include "bindings.h"
#include "probe.h"

namespace qnext {
namespace {

template <class Job>
double seconds(const Job& job) {
  const auto start = std::chrono::steady_clock::now();
  pool().run(job);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Keeps results observable.
struct alignas(64) Sink {
  char bytes[256];
};

double read_bandwidth(Array<const uint8_t> buffer) {
  const int64_t bytes = static_cast<int64_t>(buffer.size()) / 512 * 512;
  const char* data = reinterpret_cast<const char*>(buffer.data());
  if (bytes == 0 || reinterpret_cast<uintptr_t>(data) % 64) {
    throw nb::value_error("buffer: expected at least 512 bytes at a multiple of 64.");
  }
  const ProbeKernels& kernels = probe_kernels(current_isa());
  nb::gil_scoped_release release;
  std::atomic<int64_t> mix{0};
  const double time = seconds([&](Team& team) {
    int64_t first, last;
    team.range(bytes, 512, &first, &last);
    if (first < last) mix += kernels.read(data + first, last - first);
  });
  const volatile int64_t observed = mix;
  static_cast<void>(observed);
  return static_cast<double>(bytes) / time;
}

double peak(int64_t (*kernel)(int64_t, void*)) {
  nb::gil_scoped_release release;
  std::vector<Sink> sinks(static_cast<size_t>(pool().threads()));
  for (int64_t turns = 1 << 14;; turns *= 4) {
    std::atomic<int64_t> operations{0};
    const double time = seconds([&](Team& team) {
      operations += kernel(turns, sinks[static_cast<size_t>(team.thread)].bytes);
    });
    if (time > 0.004) return static_cast<double>(operations) / time;
  }
}

}  // namespace

void bind_probe(nb::module_& m) {
  m.def("read_bandwidth", &read_bandwidth, nb::arg("buffer"),
        "Bytes per second at which all threads read a buffer, once. Give it more than the caches.");
  m.def("peak_int8", [] { return peak(probe_kernels(current_isa()).int8); },
        "8-bit integer operations per second of all threads, from registers.");
  m.def("peak_bf16", [] { return peak(probe_kernels(current_isa()).bf16); },
        "Operations per second with bf16 weights (float32 ones where bf16 has no instructions).");
}

}  // namespace qnext
