// What the files of the delta kernels share: the prepared tokens of one work item.
#pragma once

#include "gated_delta.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

// Up to kDeltaBlock tokens of one key head, ready for the recurrence. C below is kDeltaBlock,
// r the value heads of the key head. All arrays are this thread's scratch.
struct DeltaBlock {
  int64_t tokens;
  int64_t key_dim, value_dim, group;  // K, M, r
  float* q;       // [C][K], unit length times K^-0.5
  float* k;       // [C][K], unit length
  float* qk;      // [C], q . k
  float* v;       // [r][C][M]
  float* alpha;   // [r][C], the decay
  float* beta;    // [r][C]
  float* d;       // [r][C][M], corrections
  float* out;     // [r][C][M], what the queries read
  float* work;    // a private block of state
};

// A token that was run earlier and is applied to the state now.
struct DeltaUpdate {
  const float* k;  // [K]
  const float* d;  // [M]
  float alpha;
};

// Floats of `work`.
int64_t delta_step_work(const DeltaShape& shape);

// Run value head `w` (0 .. r-1) of the block token by token. First the `kept` updates are applied
// to `state` [K][M]; then the block's tokens, which change `state` unless `speculative`. `next`: the
// state that is read after this one, asked for while this one is in the cache; or null.
void delta_step(const DeltaBlock& block, int64_t w, float* state, const DeltaUpdate* updates,
                int64_t kept, bool speculative, const float* next);

}  // namespace qnext::QNEXT_ISA
