// Gated DeltaNet between its projections: convolution, SiLU, L2 norms, gates, the recurrence and
// the gated norm, for a ragged batch of sequences. The plain form is in src/qnext/ops: conv,
// gated_delta and norm.
//
// A work item is one key head of one sequence: all its tokens, no barrier inside. Letters are those
// of docs/notation.md: U key heads, W value heads, r = W / U, K and M their widths, J taps,
// ch = 2 U K + W M convolution channels.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "share.h"

namespace qnext {

struct DeltaShape {
  int64_t key_heads = 0;    // U
  int64_t value_heads = 0;  // W, a multiple of U
  int64_t key_dim = 0;      // K
  int64_t value_dim = 0;    // M
  int64_t taps = 0;         // J, at least 1
};

// The functions of a shape have internal linkage: each instruction set keeps its own copy.
static inline int64_t delta_channels(const DeltaShape& s) {
  return 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim;
}
// Floats of one pending token: k [U][K] normalised, then d [W][M], then alpha [W].
static inline int64_t delta_pending_floats(const DeltaShape& s) {
  return s.key_heads * s.key_dim + s.value_heads * s.value_dim + s.value_heads;
}

// Tokens made ready for the recurrence at once, and the most pending tokens a sequence may have.
constexpr int64_t kDeltaBlock = 64;

enum class WindowType : int { f32 = 0, bf16 = 1 };

struct DeltaLayer {
  DeltaShape shape;
  WindowType window_type = WindowType::f32;
  const float* conv_weight = nullptr;  // [J][ch], the checkpoint's [ch][1][J] transposed once
  const float* a_log = nullptr;        // [W]
  const float* dt_bias = nullptr;      // [W]
  const float* norm_weight = nullptr;  // [M], multiplied as it is (not 1 + w)
  float eps = 0.0f;                    // of the gated norm
};

// The state after `count` (1 .. tokens) of a sequence's new tokens, copied to another slot.
struct DeltaCapture {
  int64_t count = 0;
  float* state = nullptr;  // [W][K][M]
  void* window = nullptr;  // [J-1][ch] in the window type
};

// One sequence. Its pending tokens are those of its last speculative step; `kept` of them are
// applied to state and window before anything else, exactly as stepping would have done. Then
//   tokens == 0    nothing more: the sequence is settled (before a snapshot, a copy, a save);
//   speculative    the tokens run on a private copy; what is needed to apply them later is stored
//                  as pending (tokens <= the capacity of the buffers <= kDeltaBlock); no captures;
//   otherwise      state and window move on by all tokens.
// Forgetting tokens costs nothing: the next call is given a smaller `kept`. After every call `kept`
// starts at 0 again.
struct DeltaSequence {
  int64_t first_row = 0;
  int64_t tokens = 0;
  int64_t kept = 0;
  bool speculative = false;
  float* state = nullptr;          // [W][K][M], as PyTorch's form has it
  void* window = nullptr;          // [J-1][ch] in the window type, oldest first
  float* pending = nullptr;        // [capacity][delta_pending_floats]; null where never speculative
  void* pending_window = nullptr;  // [capacity][ch] in the window type: the convolution's inputs
  const DeltaCapture* captures = nullptr;
  int64_t num_captures = 0;
};

struct DeltaBatch {
  const float* qkvz = nullptr;  // row p, key head u: q [K], k [K], v [r M], z [r M]
  int64_t qkvz_stride = 0;      // floats from row to row, at least 2 U K + 2 W M
  const float* ba = nullptr;    // row p, key head u: b [r], then a [r]
  int64_t ba_stride = 0;        // at least 2 W
  float* y = nullptr;           // [P][W M], after the gated norm
  const DeltaSequence* sequences = nullptr;
  int64_t num_sequences = 0;
};

struct DeltaKernels {
  // Bytes one thread needs as scratch, 64-byte aligned.
  int64_t (*scratch_bytes)(const DeltaShape& shape);

  // The team's share of all items. Items are ordered by key head: where U is a multiple of the
  // number of threads, thread i has exactly the heads i U / n .. (i + 1) U / n of every sequence.
  // Convolution inputs are rounded to the window type before use, so results do not depend on where
  // a sequence was cut into steps; nor on other sequences, nor on the number of threads.
  void (*forward)(const DeltaLayer& layer, const DeltaBatch& batch, void* scratch,
                  const Team& team);
};

QNEXT_FAMILY(DeltaKernels, delta_kernels)

}  // namespace qnext
