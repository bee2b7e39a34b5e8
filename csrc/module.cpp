// The Python module qnext._native: the only file, with its bind_*.cpp neighbours, that knows Python.
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "bindings.h"

namespace qnext {
namespace {

std::unique_ptr<ThreadPool> the_pool;

void set_threads(int threads) {
  if (threads < 1) throw nb::value_error("threads: expected at least 1.");
  if (!the_pool || the_pool->threads() != threads) {
    the_pool = std::make_unique<ThreadPool>(threads);
  }
}

void choose_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (name == isa_name(static_cast<Isa>(i))) {
      set_isa(static_cast<Isa>(i));
      return;
    }
  }
  throw nb::value_error("this processor cannot run that instruction set.");
}

}  // namespace

ThreadPool& pool() {
  if (!the_pool) set_threads(1);
  return *the_pool;
}

}  // namespace qnext

NB_MODULE(_native, m) {
  using namespace qnext;
  m.doc() = "Native CPU kernels of qnext.";
  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
  m.def("isa", [] { return std::string(isa_name(current_isa())); });
  m.def("set_isa", &choose_isa);
  m.def("threads", [] { return pool().threads(); });
  m.def("set_threads", &set_threads);
  bind_attention(m);
  bind_gated_delta(m);
  bind_norm(m);
  bind_moe(m);
  bind_decoder(m);
  bind_linear(m);
  bind_probe(m);
  bind_round(m);
  bind_sampling(m);
  bind_lane(m);
  bind_training(m);
}
