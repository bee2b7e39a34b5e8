// The passes over a whole vocabulary that choosing a token needs.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace qnext {

constexpr int64_t kPeak = 64;  // scores that share an entry of `peaks`

struct SamplingKernels {
  // out[i] = the largest of x[64 i ... 64 i + 63], n scores in all; NaN counts for nothing.
  void (*peaks)(const float* x, int64_t n, float* out);

  // Sum of exp((x - top) / temperature), to 1e-6 relative.
  double (*sum_exp)(const float* x, int64_t n, float top, float temperature);

  // x[i] = -inf where bit i of words is not set.
  void (*mask)(float* x, int64_t n, const uint32_t* words);

  // First word of Philox 4x32-10 for counters (ids[i], index, 0, 0), and from its upper 24 bits
  // standard Gumbel noise to 1e-4; n is at most 64.
  void (*noise)(const int32_t* ids, int64_t n, uint64_t seed, uint32_t index, uint32_t* bits,
                float* rough);
};

QNEXT_FAMILY(SamplingKernels, sampling_kernels)

}  // namespace qnext
