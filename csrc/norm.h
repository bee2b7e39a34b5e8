// Norms and other functions of single rows.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "share.h"

namespace qnext {

struct NormKernels {
  // out[p][d] = x[p][d] / sqrt(mean_d(x^2) + eps) * weight[d] for the team's share of `rows` rows.
  // The weight already contains the 1 of the zero-centred convention. out may be x.
  void (*rms_norm)(const float* x, int64_t rows, int64_t width, const float* weight, float eps,
                   float* out, const Team& team);
};

QNEXT_FAMILY(NormKernels, norm_kernels)

}  // namespace qnext
