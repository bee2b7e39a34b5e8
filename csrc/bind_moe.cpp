#include "bindings.h"
#include "moe.h"

namespace qnext {

void bind_moe(nb::module_& m) {
  m.def(
      "router",
      [](Array<const float> x, const Matrix& w, Array<float> logits) {
        const auto rows = static_cast<int64_t>(x.size()) / w.cols;
        nb::gil_scoped_release release;
        pool().run([&](Team& team) {
          moe_kernels(current_isa()).router(x.data(), rows, w, logits.data(), team);
        });
      },
      nb::arg("x"), nb::arg("w"), nb::arg("logits"), "x [rows, D] times W [E, D] -> logits.");
  m.def(
      "top_k",
      [](Array<const float> logits, int64_t experts, int64_t k, bool rescale, Array<int32_t> ids,
         Array<float> weights) {
        const auto rows = static_cast<int64_t>(logits.size()) / experts;
        nb::gil_scoped_release release;
        moe_kernels(current_isa())
            .top_k(logits.data(), 0, rows, experts, k, rescale, ids.data(), weights.data());
      },
      nb::arg("logits"), nb::arg("experts"), nb::arg("k"), nb::arg("rescale"), nb::arg("ids"),
      nb::arg("weights"), "The k likeliest experts of every row, and their weights.");
  m.def(
      "silu_multiply",
      [](Array<const float> gate, Array<const float> up, int64_t width, Array<float> out) {
        const auto rows = static_cast<int64_t>(gate.size()) / width;
        moe_kernels(current_isa())
            .silu_multiply(gate.data(), up.data(), rows, width, width, out.data(), width);
      },
      nb::arg("gate"), nb::arg("up"), nb::arg("width"), nb::arg("out"), "silu(gate) * up -> out.");
}

}  // namespace qnext
