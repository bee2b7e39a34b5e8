// Forward and backward passes of training. A call runs on the thread that makes it: workers are one
// per core already, each with a micro-batch of its own.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace qnext {

enum class Number : int { f32 = 0, bf16 = 1 };

// The expert every token goes through.
struct SharedExpert {
  int64_t inner;       // 0 where there is none
  const void* gate;    // [inner][width]
  const void* up;      // [inner][width]
  const void* down;    // [width][inner]
  float* share;        // [tokens], what its output is multiplied by
  void* before;        // [tokens][2 inner]
  float* d_share;
  void* d_gate;
  void* d_up;
  void* d_down;
};

// Experts of one layer. Slots (token, place) are sorted by expert: order[starts[e]] ...
// order[starts[e + 1] - 1] are the slots of expert e in rising order, slot = token * slots + place.
struct ExpertsCall {
  Number number;  // of h, gate_up, down, before, y and their gradients
  int64_t tokens, slots, experts, width, inner;
  const void* h;         // [tokens][width]
  const float* weights;  // [tokens][slots]
  const void* gate_up;   // [experts][2 inner][width], gate rows first
  const void* down;      // [experts][width][inner]
  int32_t* order;        // [tokens * slots]
  int64_t* starts;       // [experts + 1]
  void* before;          // [tokens * slots][2 inner], sorted: what the activation gets
  void* y;               // forward: [tokens][width]
  const void* d_y;       // the rest for backward: gradients of y ...
  void* d_h;             // ... and of what the names say
  float* d_weights;      // [tokens][slots]
  void* d_gate_up;
  void* d_down;
  SharedExpert shared;
};

// A delta layer between its projections, over whole documents that start from nothing. Letters are
// those of docs/notation.md: U key heads, W value heads, K and M their widths, J taps of the
// convolution, ch = 2 U K + W M channels.
struct DeltaLayerCall {
  Number number;  // of qkvz, ba, y and their gradients
  int64_t tokens, key_heads, value_heads, key_dim, value_dim, taps;
  int64_t chunk;  // tokens solved at once: 32 or 64
  int64_t documents;
  const int64_t* starts;  // [documents + 1]
  const void* qkvz;       // [tokens][2 U K + 2 W M], grouped by key head: q, k, values, gates
  const void* ba;         // [tokens][2 W], grouped by key head: b, a
  const float* conv;      // [ch][J]
  const float* a_log;     // [W]
  const float* dt_bias;   // [W]
  const float* norm;      // [M]
  float eps;
  float* states;   // [chunks][W][K][M], entering each chunk; chunks document by document
  float* written;  // [tokens][W][M]
  float* out;      // [tokens][W][M], before the norm
  void* y;         // [tokens][W M]
  const void* d_y;
  void* d_qkvz;
  void* d_ba;
  float* d_conv;
  float* d_a_log;
  float* d_dt_bias;
  float* d_norm;
};

// Causal softmax attention inside each document; N query heads, G key heads, H their width.
struct AttentionCall {
  Number number;  // of q, k, v, y and their gradients
  int64_t query_heads, key_heads, width;
  int64_t documents;
  const int64_t* starts;  // [documents + 1]
  float scale;
  const void* q;  // [tokens][N][H]
  const void* k;  // [tokens][G][H]
  const void* v;  // [tokens][G][H]
  void* y;        // [tokens][N][H]
  float* lse;     // [tokens][N], logarithm of the sum of exponentials of the scores
  const void* d_y;
  void* d_q;
  void* d_k;
  void* d_v;
};

// Zero-centred RMS norm: y = x / rms(x) * (1 + weight). With `added`, x + added takes the place of x
// and is written to `sum`; in backward `d_sum` is the gradient of x from elsewhere.
struct NormCall {
  Number number;  // of x, y and their gradients
  int64_t rows, width;
  int64_t stride;  // numbers from one row of x to the next; the other arrays have none
  const void* x;
  const float* weight;  // [width]
  float eps;
  void* y;
  float* inverse;  // [rows], 1 / rms
  const void* d_y;
  void* d_x;        // [rows][width]
  float* d_weight;
  const void* added;  // [rows][width] or null
  void* sum;          // [rows][width]
  const void* d_sum;  // [rows][width] or null
};

// Softmax over experts and the largest `slots` of it, the lower number first among equals.
struct RouteCall {
  int64_t rows, experts, slots;
  bool rescale;         // divide by their sum
  const float* logits;  // [rows][experts]
  float* weights;       // [rows][slots]
  int64_t* ids;
  const float* d_weights;
  float* d_logits;  // [rows][experts]
};

// A sparse layer after its norm: the router, its choice, and experts that read and weigh accordingly.
struct SparseCall {
  ExpertsCall experts;  // its sorting and the weights of slots are written here
  bool rescale;
  const float* router;   // [experts][width]
  const void* opening;   // [width], before the sigmoid of the share; null without a shared expert
  const void* residual;  // [tokens][width] added to y, or null
  float* logits;         // [tokens][experts]
  int64_t* ids;          // [tokens][slots]
  float* weights;
  const float* d_logits;  // of what else reads the logits, or null
  float* d_router;
  void* d_opening;
};

// Sums over the rows of a router: what the balance of the load and the telemetry need.
struct LoadCall {
  int64_t rows, experts, slots;
  const float* logits;   // [rows][experts]
  float* lse;            // [rows]
  int64_t* counts;       // [experts], slots per expert
  float* probability;    // [experts], sum of the softmax
  float* squares;        // one number: sum of lse squared
  float* entropy;        // one number: sum of the entropies
  const float* d_probability;
  float d_squares;
  float* d_logits;
};

// Cross-entropy of rows of logits; they become their slopes where `slopes` is set.
struct CrossEntropyCall {
  Number number;
  int64_t rows, vocabulary;
  void* logits;           // [rows][vocabulary]
  const int64_t* labels;  // [rows]
  const float* weights;   // [rows]
  bool slopes;            // weight (softmax - label) into logits
  float* loss;            // [rows]
  float* lse;
  bool* hits;  // the label is the first of the largest
};

// One step of AdamW over one parameter.
struct AdamCall {
  int64_t count;
  float* master;
  float* first;
  float* second;
  const float* gradient;
  void* working;  // bfloat16 copy of the master, or null
  float scale;    // of the gradient
  float keep;     // of the master: 1 - rate * decay
  float a, b;     // shares of the new gradient in the moments: 1 - beta
  float rate;     // over the correction of the first moment
  float size;     // 1 / sqrt of the correction of the second
  float epsilon;
};

// Sorts slots by expert, in rising order within one; false for a number of no expert.
static inline bool sort_slots(const int64_t* ids, int64_t count, int64_t experts, int32_t* order,
                              int64_t* starts) {
  for (int64_t e = 0; e <= experts; ++e) starts[e] = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= experts) return false;
    ++starts[ids[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  // While slots are placed starts[e] moves to where e ends, which is where e + 1 begins.
  for (int64_t i = 0; i < count; ++i) order[starts[ids[i]]++] = static_cast<int32_t>(i);
  for (int64_t e = experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
  return true;
}

struct TrainingKernels {
  // Both false when there is no memory for the intermediate rows.
  bool (*experts_forward)(const ExpertsCall& call);
  bool (*experts_backward)(const ExpertsCall& call);
  bool (*sparse_forward)(const SparseCall& call);
  bool (*sparse_backward)(const SparseCall& call);
  bool (*delta_forward)(const DeltaLayerCall& call);
  bool (*delta_backward)(const DeltaLayerCall& call);
  bool (*attention_forward)(const AttentionCall& call);
  bool (*attention_backward)(const AttentionCall& call);
  void (*norm_forward)(const NormCall& call);
  bool (*norm_backward)(const NormCall& call);
  void (*route_forward)(const RouteCall& call);
  void (*route_backward)(const RouteCall& call);
  bool (*load_forward)(const LoadCall& call);
  void (*load_backward)(const LoadCall& call);
  void (*cross_entropy)(const CrossEntropyCall& call);
  void (*adam)(const AdamCall& call);
};

QNEXT_FAMILY(TrainingKernels, training_kernels)

}  // namespace qnext
