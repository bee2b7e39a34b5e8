// Routers and what follows from them: the choice of experts, the sums that balance their load, and a
// whole sparse layer, whose rows pass from one part to the next in float32.
#include "training_sparse.h"

#include <math.h>

#include "packed_product.h"
#include "softmax_rows.h"
#include "training_experts.h"
#include "training_memory.h"

namespace qnext::QNEXT_ISA {
namespace {

#if defined(QNEXT_ISA_avx512)
// The largest of up to 16 N numbers, without a branch that depends on them; NaN counts as the least.
template <int N>
void choose_vectors(const float* x, int64_t count, int64_t slots, int64_t* ids) {
  const __m512 least = _mm512_set1_ps(-INFINITY);
  __m512 v[N];
  for (int j = 0; j < N; ++j) {
    const int64_t n = count - 16 * j;
    const __mmask16 there = n >= 16  ? 0xffff
                            : n <= 0 ? 0
                                     : static_cast<__mmask16>((1u << n) - 1u);
    v[j] = _mm512_mask_loadu_ps(least, there, x + 16 * j);
    v[j] = _mm512_mask_mov_ps(least, _mm512_cmp_ps_mask(v[j], v[j], _CMP_ORD_Q), v[j]);
  }
  for (int64_t s = 0; s < slots; ++s) {
    __m512 top = v[0];
    for (int j = 1; j < N; ++j) top = _mm512_max_ps(top, v[j]);
    const float best = _mm512_reduce_max_ps(top);
    if (best == -INFINITY) {  // the first that is left
      int64_t e = 0;
      for (int64_t i = 0; i < s;) i = ids[i] == e ? (++e, 0) : i + 1;
      ids[s] = e;
      continue;
    }
    const __m512 all = _mm512_set1_ps(best);
    int64_t found = count;
    for (int j = N - 1; j >= 0; --j) {
      const uint32_t mask = _mm512_cmp_ps_mask(v[j], all, _CMP_EQ_OQ);
      if (mask) found = 16 * j + __builtin_ctz(mask);
    }
    for (int j = 0; j < N; ++j) {
      const __mmask16 it = found / 16 == j ? static_cast<__mmask16>(1u << found % 16) : 0;
      v[j] = _mm512_mask_mov_ps(v[j], it, least);
    }
    ids[s] = found;
  }
}
#endif

// The numbers of the `slots` largest, largest first, the lower number first among equals.
void choose(const float* x, int64_t count, int64_t slots, int64_t* ids) {
#if defined(QNEXT_ISA_avx512)
  if (count <= 32) return choose_vectors<2>(x, count, slots, ids);
  if (count <= 64) return choose_vectors<4>(x, count, slots, ids);
  if (count <= 128) return choose_vectors<8>(x, count, slots, ids);
#endif
  // Insertion into the slots so far; NaN never enters before a number.
  int64_t filled = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (filled == slots && !(x[e] > x[ids[filled - 1]])) continue;
    int64_t at = filled < slots ? filled++ : filled - 1;
    for (; at > 0 && (x[e] > x[ids[at - 1]]); --at) ids[at] = ids[at - 1];
    ids[at] = e;
  }
}

// Rows whose float32 copies a core's cache holds beside the router.
constexpr int64_t kRouterRows = 64;

template <class T>
void widen(const void* from, int64_t count, float* to) {
  const T* x = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; i += Vec::width) {
    const int64_t n = count - i;
    store_some(load_some(x + i, n), to + i, n);
  }
}

// logits = h router^T, and the share of the shared expert.
template <class T>
bool look(const SparseCall& c) {
  const ExpertsCall& x = c.experts;
  const int64_t D = x.width, E = x.experts;
  Memory memory;
  Lane* packed = memory.take<Lane>(packed_lanes<float>(E, D));
  float* rows = memory.take<float>(kRouterRows * D);
  float* opening = memory.take<float>(D);
  if (!memory.obtain()) return false;
  memory.place(&packed, &rows, &opening);
  pack_columns(c.router, E, D, D, packed);
  if (x.shared.inner) widen<T>(c.opening, D, opening);
  const Lane* left[kRouterRows];
  void* out[kRouterRows];
  for (int64_t first = 0; first < x.tokens; first += kRouterRows) {
    const int64_t n = x.tokens - first < kRouterRows ? x.tokens - first : kRouterRows;
    widen<T>(static_cast<const T*>(x.h) + first * D, n * D, rows);
    for (int64_t i = 0; i < n; ++i) {
      left[i] = reinterpret_cast<const Lane*>(rows + i * D);
      out[i] = c.logits + (first + i) * E;
    }
    product<float>({left, 1}, packed, D, n, E, out, Put::set);
    for (int64_t i = 0; i < n && x.shared.inner; ++i) {
      Vec sum = Vec::zero();
      for (int64_t d = 0; d < D; d += Vec::width) {
        sum = fma(load_some(rows + i * D + d, D - d), load_some(opening + d, D - d), sum);
      }
      x.shared.share[first + i] = 1.0f / (1.0f + expf(-sum.sum()));
    }
  }
  return true;
}

// Gradients of router and opening, and what flows through both into the sums of d_h. The opening is
// one more row of the router here.
template <class T>
bool look_back(const SparseCall& c, const float* d_logits, float* sums) {
  const ExpertsCall& x = c.experts;
  const int64_t D = x.width, E = x.experts, R = E + (x.shared.inner ? 1 : 0);
  const int64_t panels = panels_of(D);
  Memory memory;
  float* both = memory.take<float>(R * D);
  Lane* router = memory.take<Lane>(packed_lanes<float>(D, R));
  Lane* packed = memory.take<Lane>(panels * kPanel * kRouterRows);
  float* slopes = memory.take<float>(kRouterRows * R);
  float* rows = memory.take<float>(kRouterRows * D);
  float* found = memory.take<float>(R * D);
  const float** rows_of = memory.take<const float*>(R > kRouterRows ? R : kRouterRows);
  const Lane** left = memory.take<const Lane*>(R > kRouterRows ? R : kRouterRows);
  void** out = memory.take<void*>(R > kRouterRows ? R : kRouterRows);
  if (!memory.obtain()) return false;
  memory.place(&both, &router, &packed, &slopes, &rows, &found, &rows_of, &left, &out);
  memcpy(both, c.router, static_cast<size_t>(E * D) * sizeof(float));
  if (R > E) widen<T>(c.opening, D, both + E * D);
  for (int64_t e = 0; e < R; ++e) rows_of[e] = both + e * D;
  pack_rows(rows_of, R, D, kPanel, router);
  for (int64_t first = 0; first < x.tokens; first += kRouterRows) {
    const int64_t n = x.tokens - first < kRouterRows ? x.tokens - first : kRouterRows;
    for (int64_t i = 0; i < n; ++i) {
      memcpy(slopes + i * R, d_logits + (first + i) * E, static_cast<size_t>(E) * sizeof(float));
      if (R > E) {
        const float share = x.shared.share[first + i];
        slopes[i * R + E] = x.shared.d_share[first + i] * share * (1.0f - share);
      }
      left[i] = reinterpret_cast<const Lane*>(slopes + i * R);
      out[i] = sums + (first + i) * D;
    }
    product<float>({left, 1}, router, R, n, D, out, Put::add);
    widen<T>(static_cast<const T*>(x.h) + first * D, n * D, rows);
    for (int64_t i = 0; i < n; ++i) rows_of[i] = rows + i * D;
    pack_rows(rows_of, n, D, kPanel, packed);
    for (int64_t e = 0; e < R; ++e) {
      left[e] = reinterpret_cast<const Lane*>(slopes + e);
      out[e] = found + e * D;
    }
    product<float>({left, R}, packed, n, R, D, out, first ? Put::add : Put::set);
  }
  memcpy(c.d_router, found, static_cast<size_t>(E * D) * sizeof(float));
  if (R > E) round_sums(x.number, found + E * D, nullptr, D, c.d_opening);
  return true;
}

}  // namespace

void route_forward(const RouteCall& c) {
  for (int64_t p = 0; p < c.rows; ++p) {
    const float* x = c.logits + p * c.experts;
    int64_t* ids = c.ids + p * c.slots;
    float* weights = c.weights + p * c.slots;
    choose(x, c.experts, c.slots, ids);
    const float top = x[ids[0]];
    float mass = 0.0f;
    for (int64_t s = 0; s < c.slots; ++s) {
      weights[s] = expf(x[ids[s]] - top);
      mass += weights[s];
    }
    if (!c.rescale) mass = mass_of(x, c.experts, top);
    for (int64_t s = 0; s < c.slots; ++s) weights[s] /= mass;
  }
}

void route_backward(const RouteCall& c) {
  for (int64_t p = 0; p < c.rows; ++p) {
    const int64_t* ids = c.ids + p * c.slots;
    const float* weights = c.weights + p * c.slots;
    const float* d_weights = c.d_weights + p * c.slots;
    float* d = c.d_logits + p * c.experts;
    float along = 0.0f;
    for (int64_t s = 0; s < c.slots; ++s) along += weights[s] * d_weights[s];
    if (c.rescale) {
      memset(d, 0, static_cast<size_t>(c.experts) * sizeof(float));
      for (int64_t s = 0; s < c.slots; ++s) d[ids[s]] = weights[s] * (d_weights[s] - along);
      continue;
    }
    const float* x = c.logits + p * c.experts;
    const float top = x[ids[0]], mass = mass_of(x, c.experts, top);
    for (int64_t e = 0; e < c.experts; ++e) d[e] = -along * expf(x[e] - top) / mass;
    for (int64_t s = 0; s < c.slots; ++s) d[ids[s]] += weights[s] * d_weights[s];
  }
}

// Sums over this many rows are float32, sums of them double.
constexpr int64_t kLoadRows = 64;

bool load_forward(const LoadCall& c) {
  const int64_t E = c.experts;
  Memory memory;
  float* part = memory.take<float>(E);
  double* total = memory.take<double>(E);
  int64_t* ids = memory.take<int64_t>(c.slots);
  if (!memory.obtain()) return false;
  memory.place(&part, &total, &ids);
  memset(total, 0, static_cast<size_t>(E) * sizeof(double));
  memset(c.counts, 0, static_cast<size_t>(E) * sizeof(int64_t));
  double squares = 0.0, entropy = 0.0;
  for (int64_t first = 0; first < c.rows; first += kLoadRows) {
    const int64_t last = first + kLoadRows < c.rows ? first + kLoadRows : c.rows;
    memset(part, 0, static_cast<size_t>(E) * sizeof(float));
    for (int64_t p = first; p < last; ++p) {
      const float* x = c.logits + p * E;
      choose(x, E, c.slots, ids);
      for (int64_t s = 0; s < c.slots; ++s) ++c.counts[ids[s]];
      const float top = row_maximum(x, E), lse = top + logf(mass_of(x, E, top));
      const Vec minus = Vec::set(lse);
      Vec along = Vec::zero();
      int64_t e = 0;
      for (; e + Vec::width <= E; e += Vec::width) {
        const Vec log_p = Vec::load(x + e) - minus, p_e = exp(log_p);
        (Vec::load(part + e) + p_e).store(part + e);
        along = fma(p_e, log_p, along);
      }
      float rest = along.sum();
      for (; e < E; ++e) {
        const float p_e = expf(x[e] - lse);
        part[e] += p_e;
        rest += p_e * (x[e] - lse);
      }
      c.lse[p] = lse;
      squares += static_cast<double>(lse) * static_cast<double>(lse);
      entropy -= static_cast<double>(rest);
    }
    for (int64_t e = 0; e < E; ++e) total[e] += static_cast<double>(part[e]);
  }
  for (int64_t e = 0; e < E; ++e) c.probability[e] = static_cast<float>(total[e]);
  *c.squares = static_cast<float>(squares);
  *c.entropy = static_cast<float>(entropy);
  return true;
}

void load_backward(const LoadCall& c) {
  const int64_t E = c.experts;
  for (int64_t p = 0; p < c.rows; ++p) {
    const float *x = c.logits + p * E, *d_p = c.d_probability;
    float* d = c.d_logits + p * E;
    const Vec minus = Vec::set(c.lse[p]);
    Vec sum = Vec::zero();
    for (int64_t e = 0; e < E; e += Vec::width) {
      const int64_t n = E - e;
      const Vec p_e = exp(load_some(x + e, n) - minus);
      store_some(p_e, d + e, n);
      sum = fma(p_e, load_some(d_p + e, n), sum);  // columns that do not exist have slope 0
    }
    const Vec along = Vec::set(sum.sum() - 2.0f * c.d_squares * c.lse[p]);
    for (int64_t e = 0; e < E; e += Vec::width) {
      const int64_t n = E - e;
      store_some(load_some(d + e, n) * (load_some(d_p + e, n) - along), d + e, n);
    }
  }
}

bool sparse_forward(const SparseCall& c) {
  const ExpertsCall& x = c.experts;
  const bool seen = x.number == Number::f32 ? look<float>(c) : look<bf16>(c);
  Memory memory;
  float* sums = memory.take<float>(x.tokens * x.width);
  if (!seen || !memory.obtain()) return false;
  memory.place(&sums);
  route_forward({x.tokens, x.experts, x.slots, c.rescale, c.logits, c.weights, c.ids, nullptr,
                 nullptr});
  sort_slots(c.ids, x.tokens * x.slots, x.experts, x.order, x.starts);
  if (!experts_forward_sums(x, sums)) return false;
  round_sums(x.number, sums, c.residual, x.tokens * x.width, x.y);
  return true;
}

bool sparse_backward(const SparseCall& c) {
  const ExpertsCall& x = c.experts;
  Memory memory;
  float* sums = memory.take<float>(x.tokens * x.width);
  float* d_logits = memory.take<float>(x.tokens * x.experts);
  if (!memory.obtain()) return false;
  memory.place(&sums, &d_logits);
  if (!experts_backward_sums(x, sums)) return false;
  route_backward({x.tokens, x.experts, x.slots, c.rescale, c.logits, c.weights, c.ids, x.d_weights,
                  d_logits});
  for (int64_t i = 0; c.d_logits && i < x.tokens * x.experts; ++i) d_logits[i] += c.d_logits[i];
  const bool seen = x.number == Number::f32 ? look_back<float>(c, d_logits, sums)
                                            : look_back<bf16>(c, d_logits, sums);
  if (!seen) return false;
  round_sums(x.number, sums, nullptr, x.tokens * x.width, x.d_h);
  return true;
}

}  // namespace qnext::QNEXT_ISA
