// Routing and the small loops around expert products. The products themselves: linear.h.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "linear.h"
#include "share.h"

namespace qnext {

struct MoeKernels {
  // logits[p][e] = sum_d x[p][d] W[e][d], float32 activations whatever the weights (f32 or bf16):
  // the tenth and eleventh of 512 logits are often closer than bfloat16 sees. W is [experts][cols];
  // the team splits the experts.
  void (*router)(const float* x, int64_t rows, const Matrix& w, float* logits, const Team& team);

  // The k largest of softmax(logits[p]) for rows first <= p < last, ties to the lower expert;
  // `rescale` makes them sum to one. ids and weights are [rows][k], largest first. A row with a NaN
  // gets experts 0 ... k-1 with weights NaN.
  void (*top_k)(const float* logits, int64_t first, int64_t last, int64_t experts, int64_t k,
                bool rescale, int32_t* ids, float* weights);

  // out[i][f] = silu(gate[i][f]) * up[i][f], f < width, for `rows` rows with their own strides.
  void (*silu_multiply)(const float* gate, const float* up, int64_t rows, int64_t ld_in,
                        int64_t width, float* out, int64_t ld_out);

  // y[f] += weight * x[f], f < width.
  void (*add_scaled)(float weight, const float* x, int64_t width, float* y);
};

QNEXT_FAMILY(MoeKernels, moe_kernels)

}  // namespace qnext
