#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings.h"
#include "round.h"

namespace qnext {
namespace {

using Importance = std::optional<Array<const float>>;

struct Shape {
  int64_t rows, cols;
  const float* importance;
};

Shape checked(const Array<const float>& w, const Importance& importance, size_t codes) {
  if (w.ndim() != 2 || codes != w.size()) {
    throw nb::value_error("round: expected w and q of one shape [rows, cols].");
  }
  if (importance && importance->size() != w.shape(1)) {
    throw nb::value_error("round: expected one importance for each column.");
  }
  return {static_cast<int64_t>(w.shape(0)), static_cast<int64_t>(w.shape(1)),
          importance ? importance->data() : nullptr};
}

}  // namespace

void bind_round(nb::module_& m) {
  m.def(
      "round_q4",
      [](Array<const float> w, Importance importance, Array<float> R, Array<int8_t> s,
         Array<int8_t> q) {
        const Shape shape = checked(w, importance, q.size());
        const int64_t groups = (shape.cols + kGroup - 1) / kGroup;
        if (static_cast<int64_t>(R.size()) != shape.rows ||
            static_cast<int64_t>(s.size()) != shape.rows * groups) {
          throw nb::value_error("round_q4: expected R [rows] and s [rows, groups].");
        }
        const RoundKernels& kernels = round_kernels(current_isa());
        nb::gil_scoped_release release;
        pool().run([&](Team& team) {
          kernels.q4(w.data(), shape.rows, shape.cols, shape.importance, R.data(), s.data(),
                     q.data(), team);
        });
      },
      nb::arg("w"), nb::arg("importance").none(), nb::arg("R"), nb::arg("s"), nb::arg("q"),
      "w [rows, cols] -> R [rows], s [rows, groups of 16], q [rows, cols].");
  m.def(
      "round_q8",
      [](Array<const float> w, Importance importance, Array<float> d, Array<int8_t> q) {
        const Shape shape = checked(w, importance, q.size());
        const int64_t ranges = (shape.cols + kRange - 1) / kRange;
        if (static_cast<int64_t>(d.size()) != shape.rows * ranges) {
          throw nb::value_error("round_q8: expected d [rows, blocks].");
        }
        const RoundKernels& kernels = round_kernels(current_isa());
        nb::gil_scoped_release release;
        pool().run([&](Team& team) {
          kernels.q8(w.data(), shape.rows, shape.cols, shape.importance, d.data(), q.data(),
                     team);
        });
      },
      nb::arg("w"), nb::arg("importance").none(), nb::arg("d"), nb::arg("q"),
      "w [rows, cols] -> d [rows, blocks of 256], q [rows, cols].");
}

}  // namespace qnext
