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

// Vectors of columns swept together: enough chains of additions to hide their latency.
constexpr int kVectors = 4;

// Sums over the rows of a block of columns.
template <int V>
struct Sums {
  Vec k[V], q[V];
};

// One sweep over K rows of V vectors of columns; the last vector has `tail` columns where kTail.
// kApply: dst = alpha src + k d^T. kRead: sums of k_next^T and q_next^T times the (new) state.
template <int V, bool kTail, bool kApply, bool kRead>
void sweep(int64_t rows, const float* src, int64_t src_stride, float* dst, int64_t dst_stride,
           int tail, const DeltaUpdate& update, const float* k_next, const float* q_next,
           Sums<V>* sums) {
  Vec d[V], ks[V], qs[V];
  const Vec alpha = Vec::set(update.alpha);
  for (int j = 0; j < V; ++j) {
    const bool partial = kTail && j == V - 1;
    if (kApply) {
      d[j] = partial ? Vec::load(update.d + j * Vec::width, tail)
                     : Vec::load(update.d + j * Vec::width);
    }
    ks[j] = qs[j] = Vec::zero();
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = src + i * src_stride;
    Vec s[V];
    for (int j = 0; j < V; ++j) {
      const bool partial = kTail && j == V - 1;
      s[j] = partial ? Vec::load(from + j * Vec::width, tail) : Vec::load(from + j * Vec::width);
    }
    if (kApply) {
      const Vec k = Vec::set(update.k[i]);
      float* to = dst + i * dst_stride;
      for (int j = 0; j < V; ++j) {
        s[j] = fma(k, d[j], alpha * s[j]);
        if (kTail && j == V - 1) {
          s[j].store(to + j * Vec::width, tail);
        } else {
          s[j].store(to + j * Vec::width);
        }
      }
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
  const int64_t row = (w * kDeltaChunk + t) * block.value_dim + c;
  const Vec alpha = Vec::set(block.alpha[w * kDeltaChunk + t]);
  const Vec beta = Vec::set(block.beta[w * kDeltaChunk + t]);
  const Vec qk = Vec::set(block.qk[t]);
  for (int j = 0; j < V; ++j) {
    const int64_t at = row + j * Vec::width;
    const bool partial = kTail && j == V - 1;
    const Vec v = partial ? Vec::load(block.v + at, tail) : Vec::load(block.v + at);
    const Vec d = beta * (v - alpha * sums.k[j]);
    const Vec out = fma(qk, d, alpha * sums.q[j]);
    if (partial) {
      d.store(block.d + at, tail);
      out.store(block.out + at, tail);
    } else {
      d.store(block.d + at);
      out.store(block.out + at);
    }
  }
}

// All tokens of one value head for V vectors of columns from c on.
template <int V, bool kTail>
void walk(const DeltaBlock& block, int64_t w, float* state, const DeltaUpdate* updates,
          int64_t kept, bool speculative, int64_t c, int tail) {
  const int64_t K = block.key_dim, M = block.value_dim, T = block.tokens;
  constexpr int64_t kWidth = V * Vec::width;
  float* base = state + c;
  Sums<V> sums;
  if (kept == 0 && T > 0) {
    sweep<V, kTail, false, true>(K, base, M, nullptr, 0, tail, {nullptr, nullptr, 0.0f}, block.k,
                                 block.q, &sums);
    finish<V, kTail>(block, w, 0, sums, c, tail);
  }
  // Update i is a kept token, then token i - kept of the block. The last token of a speculative
  // block is not applied: nobody reads the private state after it.
  const int64_t count = kept + (speculative ? T - 1 : T);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = i - kept, next = t + 1;
    DeltaUpdate update;
    if (t < 0) {
      update = {updates[i].k, updates[i].d + c, updates[i].alpha};
    } else {
      const int64_t at = w * kDeltaChunk + t;
      update = {block.k + t * K, block.d + at * M + c, block.alpha[at]};
    }
    const bool copied = speculative && t > 0, copy = speculative && t >= 0;
    const float* src = copied ? block.work : base;
    const int64_t src_stride = copied ? kWidth : M;
    float* dst = copy ? block.work : base;
    const int64_t dst_stride = copy ? kWidth : M;
    if (next < 0 || next >= T) {
      sweep<V, kTail, true, false>(K, src, src_stride, dst, dst_stride, tail, update, nullptr,
                                   nullptr, &sums);
      continue;
    }
    sweep<V, kTail, true, true>(K, src, src_stride, dst, dst_stride, tail, update,
                                block.k + next * K, block.q + next * K, &sums);
    finish<V, kTail>(block, w, next, sums, c, tail);
  }
}

}  // namespace

int64_t delta_step_work(const DeltaShape& shape) {
  return shape.key_dim * kVectors * Vec::width;
}

void delta_step(const DeltaBlock& block, int64_t w, float* state, const DeltaUpdate* updates,
                int64_t kept, bool speculative) {
  const int64_t M = block.value_dim;
  int64_t c = 0;
  for (; c + kVectors * Vec::width <= M; c += kVectors * Vec::width) {
    walk<kVectors, false>(block, w, state, updates, kept, speculative, c, Vec::width);
  }
  for (; c + Vec::width <= M; c += Vec::width) {
    walk<1, false>(block, w, state, updates, kept, speculative, c, Vec::width);
  }
  if (c < M) {
    walk<1, true>(block, w, state, updates, kept, speculative, c, static_cast<int>(M - c));
  }
}

}  // namespace qnext::QNEXT_ISA
