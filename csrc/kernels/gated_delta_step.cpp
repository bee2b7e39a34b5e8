// The gated delta rule token by token, columns of the state in blocks that stay in L1.
//
// Per token: p = k^T S, u = q^T S read the state once; d = beta (v - alpha p); the output is
// alpha u + (q.k) d, so the new state S' = alpha S + k d^T need not be read again. Writing S' and
// reading it for the next token is one sweep. Every element of S goes through the same operations
// in the same order however many tokens a call has and whether they are applied now or later:
// stepping, verifying and applying kept tokens agree in every bit.
#include "gated_delta_item.h"

namespace qnext::QNEXT_ISA {
namespace {

// Vectors of columns swept together: enough chains of additions to hide their latency, and as much
// of a row of the state as the registers allow.
#if defined(QNEXT_ISA_avx512)
constexpr int kVectors = 8;
#else
constexpr int kVectors = 4;
#endif

constexpr int kHalf = 4;  // for narrow heads: still as many chains of additions as hide their latency

constexpr int64_t kAhead = 16;  // rows: far enough to hide memory, near enough to stay in L1
constexpr int kLine = 16;       // floats

// Sums over the rows of a block of columns.
template <int V>
struct Sums {
  Vec k[V], q[V];
};

template <int V, bool kTail>
inline Vec load(const float* p, int j, int tail) {
  return kTail && j == V - 1 ? Vec::load(p + j * Vec::width, tail) : Vec::load(p + j * Vec::width);
}

template <int V, bool kTail>
inline void store(Vec v, float* p, int j, int tail) {
  if (kTail && j == V - 1) {
    v.store(p + j * Vec::width, tail);
  } else {
    v.store(p + j * Vec::width);
  }
}

// One sweep over K rows of V vectors of columns from c on; the last vector has `tail` columns where
// kTail. `count` updates, one after another, give dst = alpha src + k d^T (without any, nothing is
// written). kRead: sums of k_next^T and q_next^T times the new state. kFar: src is still in memory.
// `next`: rows to ask for meanwhile, as far apart as those of src.
// kOne: count is 1, and what it needs of the update stays in registers.
template <int V, bool kTail, bool kRead, bool kFar, bool kOne = false>
void sweep(int64_t rows, const float* src, int64_t src_stride, float* dst, int64_t dst_stride,
           int64_t c, int tail, const DeltaUpdate* updates, int64_t count, const float* k_next,
           const float* q_next, Sums<V>* sums, const float* next = nullptr) {
  Vec ks[V], qs[V];
  for (int j = 0; j < V; ++j) ks[j] = qs[j] = Vec::zero();
  Vec one_d[V], one_alpha = Vec::zero();
  if constexpr (kOne) {
    for (int j = 0; j < V; ++j) one_d[j] = load<V, kTail>(updates->d + c, j, tail);
    one_alpha = Vec::set(updates->alpha);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = src + i * src_stride;
    if (kFar && c == 0 && i + kAhead < rows) {
      // Whole rows, for the columns to come as well: memory is read fastest in order.
      const float* ahead = from + kAhead * src_stride;
      for (int64_t j = 0; j < src_stride; j += kLine) __builtin_prefetch(ahead + j);
    }
    if (!kFar && next) {
      const float* row = next + i * src_stride;
      for (int64_t j = 0; j < src_stride; j += kLine) __builtin_prefetch(row + j, 0, 2);
    }
    Vec s[V];
    for (int j = 0; j < V; ++j) s[j] = load<V, kTail>(from, j, tail);
    if constexpr (kOne) {
      const Vec k = Vec::set(updates->k[i]);
      for (int j = 0; j < V; ++j) s[j] = fma(k, one_d[j], one_alpha * s[j]);
    }
    for (int64_t n = 0; !kOne && n < count; ++n) {
      const Vec k = Vec::set(updates[n].k[i]), alpha = Vec::set(updates[n].alpha);
      const float* d = updates[n].d + c;
      for (int j = 0; j < V; ++j) s[j] = fma(k, load<V, kTail>(d, j, tail), alpha * s[j]);
    }
    if (count) {
      float* to = dst + i * dst_stride;
      for (int j = 0; j < V; ++j) store<V, kTail>(s[j], to, j, tail);
    }
    if (kRead) {
      const Vec k = Vec::set(k_next[i]), q = Vec::set(q_next[i]);
      for (int j = 0; j < V; ++j) {
        ks[j] = fma(k, s[j], ks[j]);
        qs[j] = fma(q, s[j], qs[j]);
      }
    }
  }
  if (kRead) {
    for (int j = 0; j < V; ++j) {
      sums->k[j] = ks[j];
      sums->q[j] = qs[j];
    }
  }
}

// The correction and the output of token t from what it read, for the columns from c on.
template <int V, bool kTail>
void finish(const DeltaBlock& block, int64_t w, int64_t t, const Sums<V>& sums, int64_t c,
            int tail) {
  const int64_t row = (w * kDeltaBlock + t) * block.value_dim + c;
  const Vec alpha = Vec::set(block.alpha[w * kDeltaBlock + t]);
  const Vec beta = Vec::set(block.beta[w * kDeltaBlock + t]);
  const Vec qk = Vec::set(block.qk[t]);
  for (int j = 0; j < V; ++j) {
    const Vec v = load<V, kTail>(block.v + row, j, tail);
    const Vec d = beta * (v - alpha * sums.k[j]);
    store<V, kTail>(d, block.d + row, j, tail);
    store<V, kTail>(fma(qk, d, alpha * sums.q[j]), block.out + row, j, tail);
  }
}

// All tokens of one value head for V vectors of columns from c on.
template <int V, bool kTail>
void walk(const DeltaBlock& block, int64_t w, float* state, const DeltaUpdate* updates,
          int64_t kept, bool speculative, const float* next_state, int64_t c, int tail) {
  const int64_t K = block.key_dim, M = block.value_dim, T = block.tokens;
  constexpr int64_t kWidth = V * Vec::width;
  float* base = state + c;
  Sums<V> sums;
  if (T == 0) {
    sweep<V, kTail, false, true>(K, base, M, base, M, c, tail, updates, kept, nullptr, nullptr,
                                 &sums);
    return;
  }
  sweep<V, kTail, true, true>(K, base, M, base, M, c, tail, updates, kept, block.k, block.q, &sums);
  finish<V, kTail>(block, w, 0, sums, c, tail);
  // Apply token t, read with the next one. Nobody reads the state after the last token of a
  // speculative block.
  const float* src = base;
  int64_t src_stride = M;
  float* dst = speculative ? block.work : base;
  const int64_t dst_stride = speculative ? kWidth : M;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t at = w * kDeltaBlock + t, next = t + 1;
    // Once is enough, and the rows lie as those of the first sweep did.
    const float* far = t == 0 && c == 0 ? next_state : nullptr;
    const DeltaUpdate update = {block.k + t * K, block.d + at * M, block.alpha[at]};
    if (next < T) {
      sweep<V, kTail, true, false, true>(K, src, src_stride, dst, dst_stride, c, tail, &update, 1,
                                   block.k + next * K, block.q + next * K, &sums, far);
      finish<V, kTail>(block, w, next, sums, c, tail);
    } else if (!speculative) {
      sweep<V, kTail, false, false, true>(K, src, src_stride, dst, dst_stride, c, tail, &update, 1,
                                    nullptr, nullptr, &sums, far);
    }
    src = dst;
    src_stride = dst_stride;
  }
}

}  // namespace

int64_t delta_step_work(const DeltaShape& shape) {
  return shape.key_dim * kVectors * Vec::width;
}

void delta_step(const DeltaBlock& block, int64_t w, float* state, const DeltaUpdate* updates,
                int64_t kept, bool speculative, const float* next) {
  const int64_t M = block.value_dim;
  int64_t c = 0;
  for (; c + kVectors * Vec::width <= M; c += kVectors * Vec::width) {
    walk<kVectors, false>(block, w, state, updates, kept, speculative, next, c, Vec::width);
  }
  if constexpr (kVectors > kHalf) {
    for (; c + kHalf * Vec::width <= M; c += kHalf * Vec::width) {
      walk<kHalf, false>(block, w, state, updates, kept, speculative, next, c, Vec::width);
    }
  }
  for (; c + Vec::width <= M; c += Vec::width) {
    walk<1, false>(block, w, state, updates, kept, speculative, next, c, Vec::width);
  }
  if (c < M) {
    walk<1, true>(block, w, state, updates, kept, speculative, next, c, static_cast<int>(M - c));
  }
}

}  // namespace qnext::QNEXT_ISA
