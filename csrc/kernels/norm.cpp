// Norms. One row is one thread's; the sum of squares runs in float32 over the lanes of a vector,
// then over the lanes: the result does not depend on the other rows or on the threads.
#include "norm.h"

#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

void rms_norm_row(const float* x, int64_t width, const float* weight, float eps, float* out) {
  Vec squares = Vec::zero();
  int64_t d = 0;
  for (; d + Vec::width <= width; d += Vec::width) {
    const Vec v = Vec::load(x + d);
    squares = fma(v, v, squares);
  }
  const int rest = static_cast<int>(width - d);
  if (rest) {
    const Vec v = Vec::load(x + d, rest);
    squares = fma(v, v, squares);
  }
  const Vec scale = Vec::set(1.0f / sqrtf(squares.sum() / static_cast<float>(width) + eps));
  for (d = 0; d + Vec::width <= width; d += Vec::width) {
    (Vec::load(x + d) * scale * Vec::load(weight + d)).store(out + d);
  }
  if (rest) (Vec::load(x + d, rest) * scale * Vec::load(weight + d, rest)).store(out + d, rest);
}

void rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float eps,
              float* out, const Team& team) {
  int64_t first, last;
  team.range(rows, 1, &first, &last);
  for (int64_t p = first; p < last; ++p) {
    rms_norm_row(x + p * width, width, weight, eps, out + p * width);
  }
}

}  // namespace

const NormKernels norm_kernels = {rms_norm};

}  // namespace qnext::QNEXT_ISA
