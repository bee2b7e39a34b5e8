// Softmax attention over keys and values that live in pages, with what surrounds it: norms and
// rotation of queries and keys, and the output gate.
//
// A token's result has the same bits whatever else is in the batch, wherever its prompt was cut
// into chunks and however many threads run: keys and values are always read back from the pages
// (rounded), positions are walked in blocks and pieces that lie on a fixed grid, and the results of
// pieces are merged in order. So one form serves decoding and prefill alike.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "share.h"

namespace qnext {

enum class CacheType : int { f32 = 0, bf16 = 1 };

// One sequence of a step.
struct AttentionSequence {
  int64_t row = 0;                 // its first row in q, k, v, cos, sin and out
  int64_t tokens = 0;              // new tokens; 0 is allowed
  int64_t before = 0;              // position of the first new token = tokens already in the pages
  int64_t first = 0;               // positions before it do not exist; at most `before`
  const int64_t* pages = nullptr;  // page of positions 0 .. page_size - 1, of the next ones, ...
};

// One attention layer of one step. P rows, N query heads, G heads of keys and values (N a multiple
// of G), H values a head (even), Y of them rotated (even): i with i + Y/2.
struct AttentionJob {
  int64_t heads = 0;      // N
  int64_t kv_heads = 0;   // G
  int64_t head_size = 0;  // H
  int64_t rotary = 0;     // Y; 0 rotates nothing
  bool gated = false;
  float scale = 1.0f;     // positive
  float eps = 0.0f;
  const float* q_norm = nullptr;  // [H], the 1 of the zero-centred convention included; or null
  const float* k_norm = nullptr;  // [H] or null
  const float* cos = nullptr;     // [P][Y]
  const float* sin = nullptr;     // [P][Y]

  const float* q = nullptr;  // [P][N * H], or gated [P][N * 2H]: per head the query, then its gate
  float* k = nullptr;        // [P][G * H]; append overwrites it
  const float* v = nullptr;  // [P][G * H]
  float* out = nullptr;      // [P][N * H]; rows of no sequence are left alone

  void* cache = nullptr;  // [pages][layers][2][page_size][G][H]: of a page the keys, then the values
  CacheType type = CacheType::f32;
  int64_t layers = 1;
  int64_t layer = 0;
  int64_t page_size = 64;

  const AttentionSequence* sequences = nullptr;
  int64_t count = 0;
};

// Every thread of a team calls `append`; the caller puts a barrier; then every thread calls
// `attend` (which may put another one). Nothing is kept in the scratch afterwards.
struct AttentionKernels {
  // Bytes of the scratch that all threads share, 64-byte aligned. Grows with the context: about
  // 1/100 of the pages that are read for one token of each sequence.
  int64_t (*scratch_bytes)(const AttentionJob& job, int threads);

  // Norm and rotate the new keys, and write keys and values into their pages.
  void (*append)(const AttentionJob& job, void* scratch, const Team& team);

  // out = softmax(q k^T * scale) v * sigmoid(gate) for the normed and rotated q, where the token at
  // position i sees first .. i.
  // A NaN that a token sees makes its result NaN; one in the values of a later token of the same
  // step may. With a bf16 cache queries and probabilities are rounded to bf16 too where the
  // processor multiplies bf16 (avx512).
  void (*attend)(const AttentionJob& job, void* scratch, Team& team);
};

QNEXT_FAMILY(AttentionKernels, attention_kernels)

}  // namespace qnext
