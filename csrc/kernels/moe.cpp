// Routing and the small loops around expert products.
#include "moe.h"

#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

// Tokens and experts that are multiplied together: their sums are registers.
#if defined(QNEXT_ISA_avx512)
constexpr int kTokens = 4, kExperts = 2;
#else
constexpr int kTokens = 2, kExperts = 2;
#endif
constexpr int64_t kFewTokens = 16;

// E experts times T tokens. A product is two sums of lanes, of every other vector of columns, then
// the tail: the same order whatever E and T are.
template <typename W, int E, int T>
void router_corner(const float* const* x, const W* w, int64_t cols, float* const* logits) {
  constexpr int64_t step = 2 * Vec::width;
  Vec sum[E][T][2];
  for (auto& of_expert : sum)
    for (auto& of_token : of_expert)
      for (Vec& v : of_token) v = Vec::zero();
  int64_t c = 0;
  for (; c + step <= cols; c += step) {
    for (int i = 0; i < 2; ++i) {
      const int64_t at = c + i * Vec::width;
      Vec weight[E];
      for (int e = 0; e < E; ++e) {
        weight[e] = Vec::load(w + e * cols + at);
        // The rows that follow, at the same place.
        if (at * sizeof(W) % 64 == 0) __builtin_prefetch(w + (E + e) * cols + at, 0, 3);
      }
      for (int t = 0; t < T; ++t) {
        const Vec value = Vec::load(x[t] + at);
        for (int e = 0; e < E; ++e) sum[e][t][i] = fma(value, weight[e], sum[e][t][i]);
      }
    }
  }
  for (int e = 0; e < E; ++e) {
    for (int t = 0; t < T; ++t) {
      float total = (sum[e][t][0] + sum[e][t][1]).sum();
      for (int64_t d = c; d < cols; ++d) {
        if constexpr (sizeof(W) == 2) {
          total = fmaf(x[t][d], from_bf16(w[e * cols + d]), total);
        } else {
          total = fmaf(x[t][d], w[e * cols + d], total);
        }
      }
      logits[t][e] = total;
    }
  }
}

// Some experts times all tokens, so that weights are read from memory once.
template <typename W, int E>
void router_strip(const float* x, int64_t rows, const W* w, int64_t cols, int64_t experts,
                  int64_t e, float* logits) {
  const float* in[kTokens];
  float* out[kTokens];
  for (int64_t p = 0; p < rows;) {
    const int64_t left = rows - p;
    const int tokens = static_cast<int>(left < kTokens ? left : kTokens);
    for (int t = 0; t < tokens; ++t) {
      in[t] = x + (p + t) * cols;
      out[t] = logits + (p + t) * experts + e;
    }
    if constexpr (kTokens == 4) {
      if (tokens == 4) router_corner<W, E, 4>(in, w + e * cols, cols, out);
      if (tokens == 3) router_corner<W, E, 3>(in, w + e * cols, cols, out);
    }
    if (tokens == 2) router_corner<W, E, 2>(in, w + e * cols, cols, out);
    if (tokens == 1) router_corner<W, E, 1>(in, w + e * cols, cols, out);
    p += tokens;
  }
}

template <typename W>
void router_rows(const float* x, int64_t rows, const W* w, int64_t cols, int64_t experts,
                 int64_t first, int64_t last, float* logits) {
  // Many tokens stay in the first-level cache a few at a time, while the weights pass.
  const int64_t block = rows <= kFewTokens ? rows : kTokens;
  for (int64_t p = 0; p < rows; p += block) {
    const int64_t count = rows - p < block ? rows - p : block;
    int64_t at = first;
    // A single token reads as fast as memory gives: one row after the other.
    for (; rows > 1 && at + kExperts <= last; at += kExperts) {
      router_strip<W, kExperts>(x + p * cols, count, w, cols, experts, at, logits + p * experts);
    }
    for (; at < last; ++at) {
      router_strip<W, 1>(x + p * cols, count, w, cols, experts, at, logits + p * experts);
    }
  }
}

void router(const float* x, int64_t rows, const Matrix& w, float* logits, const Team& team) {
  int64_t first, last;
  team.range(w.rows, 4, &first, &last);
  if (w.format == Format::bf16) {
    router_rows(x, rows, static_cast<const bf16*>(w.data), w.cols, w.rows, first, last, logits);
  } else {
    router_rows(x, rows, static_cast<const float*>(w.data), w.cols, w.rows, first, last, logits);
  }
}

void top_k(const float* logits, int64_t first, int64_t last, int64_t experts, int64_t k,
           bool rescale, int32_t* ids, float* weights) {
  for (int64_t p = first; p < last; ++p) {
    const float* row = logits + p * experts;
    int32_t* id = ids + p * k;
    float* weight = weights + p * k;
    float top = row[0], total = 0.0f, kept = 0.0f;
    for (int64_t e = 1; e < experts; ++e) top = row[e] > top ? row[e] : top;
    Vec sum = Vec::zero();
    int64_t e = 0;
    for (; e + Vec::width <= experts; e += Vec::width) {
      sum = sum + exp(Vec::load(row + e) - Vec::set(top));
    }
    total = sum.sum();
    for (; e < experts; ++e) total += expf(row[e] - top);
    // Insertion into a short sorted list: one comparison for most experts.
    int64_t have = 0;
    for (e = 0; e < experts; ++e) {
      const float value = row[e];
      if (have == k && !(value > weight[k - 1])) continue;
      int64_t at = have < k ? have++ : k - 1;
      for (; at > 0 && value > weight[at - 1]; --at) {
        weight[at] = weight[at - 1];
        id[at] = id[at - 1];
      }
      weight[at] = value;
      id[at] = static_cast<int32_t>(e);
    }
    if (!(total == total)) {
      for (int64_t i = 0; i < k; ++i) {
        id[i] = static_cast<int32_t>(i);
        weight[i] = total;
      }
      continue;
    }
    for (int64_t i = 0; i < k; ++i) {
      weight[i] = expf(weight[i] - top) / total;
      kept += weight[i];
    }
    if (rescale) {
      for (int64_t i = 0; i < k; ++i) weight[i] /= kept;
    }
  }
}

void silu_multiply(const float* gate, const float* up, int64_t rows, int64_t ld_in, int64_t width,
                   float* out, int64_t ld_out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* g = gate + i * ld_in;
    const float* u = up + i * ld_in;
    float* o = out + i * ld_out;
    int64_t f = 0;
    for (; f + Vec::width <= width; f += Vec::width) {
      (silu(Vec::load(g + f)) * Vec::load(u + f)).store(o + f);
    }
    const int rest = static_cast<int>(width - f);
    if (rest) (silu(Vec::load(g + f, rest)) * Vec::load(u + f, rest)).store(o + f, rest);
  }
}

void add_scaled(float weight, const float* x, int64_t width, float* y) {
  const Vec w = Vec::set(weight);
  int64_t f = 0;
  for (; f + Vec::width <= width; f += Vec::width) {
    fma(w, Vec::load(x + f), Vec::load(y + f)).store(y + f);
  }
  const int rest = static_cast<int>(width - f);
  if (rest) fma(w, Vec::load(x + f, rest), Vec::load(y + f, rest)).store(y + f, rest);
}

}  // namespace

const MoeKernels moe_kernels = {router, top_k, silu_multiply, add_scaled};

}  // namespace qnext::QNEXT_ISA
