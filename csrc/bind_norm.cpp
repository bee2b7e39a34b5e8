#include "bindings.h"
#include "norm.h"

namespace qnext {

void bind_norm(nb::module_& m) {
  m.def(
      "rms_norm",
      [](Array<const float> x, Array<const float> weight, float eps, Array<float> out) {
        const int64_t width = static_cast<int64_t>(weight.shape(0));
        const int64_t rows = static_cast<int64_t>(x.size()) / width;
        const NormKernels& kernels = norm_kernels(current_isa());
        nb::gil_scoped_release release;
        pool().run([&](Team& team) {
          kernels.rms_norm(x.data(), rows, width, weight.data(), eps, out.data(), team);
        });
      },
      nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"),
      "x [rows, D] / rms over D * weight [D] -> out.");
}

}  // namespace qnext
