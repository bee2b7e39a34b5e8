// Routing and the small loops around expert products.
#include "moe.h"

#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

// One dot product: lanes over the columns, the tail last. Same order for every row and token.
template <typename W>
float dot(const float* x, const W* w, int64_t cols) {
  Vec sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t c = 0;
  for (; c + 4 * Vec::width <= cols; c += 4 * Vec::width) {
    for (int i = 0; i < 4; ++i) {
      sum[i] = fma(Vec::load(x + c + i * Vec::width), Vec::load(w + c + i * Vec::width), sum[i]);
    }
  }
  float total = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
  for (; c < cols; ++c) {
    if constexpr (sizeof(W) == 2) {
      total = fmaf(x[c], from_bf16(w[c]), total);
    } else {
      total = fmaf(x[c], w[c], total);
    }
  }
  return total;
}

// Four tokens against two experts at a time: each load of weights serves four products.
template <typename W>
void router_rows(const float* x, int64_t rows, const W* w, int64_t cols, int64_t experts,
                 int64_t first, int64_t last, float* logits) {
  int64_t p = 0;
  const int64_t wide = cols / (4 * Vec::width) * (4 * Vec::width);
  for (; p + 4 <= rows && wide == cols; p += 4) {
    for (int64_t e = first; e < last; ++e) {
      // Sixteen sums: the same four per product as in dot().
      Vec sum[4][4];
      for (auto& of_token : sum)
        for (Vec& v : of_token) v = Vec::zero();
      const W* we = w + e * cols;
      for (int64_t c = 0; c < wide; c += 4 * Vec::width) {
        for (int i = 0; i < 4; ++i) {
          const Vec v = Vec::load(we + c + i * Vec::width);
          for (int t = 0; t < 4; ++t) {
            sum[t][i] = fma(Vec::load(x + (p + t) * cols + c + i * Vec::width), v, sum[t][i]);
          }
        }
      }
      for (int t = 0; t < 4; ++t) {
        logits[(p + t) * experts + e] = ((sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3])).sum();
      }
    }
  }
  for (; p < rows; ++p) {
    for (int64_t e = first; e < last; ++e) {
      logits[p * experts + e] = dot(x + p * cols, w + e * cols, cols);
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
