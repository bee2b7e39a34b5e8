// Norms, cross-entropy and the optimiser's update: one pass over each row.
#include "training_rows.h"

#include <math.h>

#include "packed_product.h"
#include "softmax_rows.h"
#include "training_memory.h"

namespace qnext::QNEXT_ISA {
namespace {

template <class T>
void norm_rows(const NormCall& c) {
  const int64_t D = c.width;
  const Vec one = Vec::set(1.0f);
  for (int64_t p = 0; p < c.rows; ++p) {
    const T* x = static_cast<const T*>(c.x) + p * c.stride;
    T* y = static_cast<T*>(c.y) + p * D;
    Vec squares = Vec::zero();
    if (c.added) {
      const T* added = static_cast<const T*>(c.added) + p * D;
      T* sum = static_cast<T*>(c.sum) + p * D;
      for (int64_t d = 0; d < D; d += Vec::width) {
        store_some(load_some(x + d, D - d) + load_some(added + d, D - d), sum + d, D - d);
      }
      x = sum;
    }
    for (int64_t d = 0; d < D; d += Vec::width) {
      const Vec v = load_some(x + d, D - d);
      squares = fma(v, v, squares);
    }
    const float inverse = 1.0f / sqrtf(squares.sum() / static_cast<float>(D) + c.eps);
    c.inverse[p] = inverse;
    const Vec by = Vec::set(inverse);
    for (int64_t d = 0; d < D; d += Vec::width) {
      const int64_t n = D - d;
      const Vec normed = load_some(x + d, n) * by;
      store_some(normed * (one + load_some(c.weight + d, n)), y + d, n);
    }
  }
}

// Sums over this many rows are float32, sums of them double.
constexpr int64_t kNormRows = 64;

template <class T>
bool norm_rows_backward(const NormCall& c) {
  const int64_t D = c.width;
  Memory memory;
  float* part = memory.take<float>(D);
  double* total = memory.take<double>(D);
  if (!memory.obtain()) return false;
  memory.place(&part, &total);
  memset(total, 0, static_cast<size_t>(D) * sizeof(double));
  const Vec one = Vec::set(1.0f);
  for (int64_t first = 0; first < c.rows; first += kNormRows) {
    const int64_t last = first + kNormRows < c.rows ? first + kNormRows : c.rows;
    memset(part, 0, static_cast<size_t>(D) * sizeof(float));
    for (int64_t p = first; p < last; ++p) {
      const T* x = static_cast<const T*>(c.x) + p * c.stride;
      const T* d_y = static_cast<const T*>(c.d_y) + p * D;
      T* d_x = static_cast<T*>(c.d_x) + p * D;
      const T* d_sum = c.d_sum ? static_cast<const T*>(c.d_sum) + p * D : nullptr;
      const Vec by = Vec::set(c.inverse[p]);
      Vec along = Vec::zero();
      for (int64_t d = 0; d < D; d += Vec::width) {
        const int64_t n = D - d;
        const Vec normed = load_some(x + d, n) * by, slope = load_some(d_y + d, n);
        store_some(fma(slope, normed, load_some(part + d, n)), part + d, n);
        along = fma(slope * (one + load_some(c.weight + d, n)), normed, along);
      }
      const Vec mean = Vec::set(along.sum() / static_cast<float>(D));
      for (int64_t d = 0; d < D; d += Vec::width) {
        const int64_t n = D - d;
        const Vec normed = load_some(x + d, n) * by;
        const Vec slope = load_some(d_y + d, n) * (one + load_some(c.weight + d, n));
        const Vec through = (slope - normed * mean) * by;
        store_some(d_sum ? through + load_some(d_sum + d, n) : through, d_x + d, n);
      }
    }
    for (int64_t d = 0; d < D; ++d) total[d] += static_cast<double>(part[d]);
  }
  for (int64_t d = 0; d < D; ++d) c.d_weight[d] = static_cast<float>(total[d]);
  return true;
}

template <class T>
void cross_entropy_rows(const CrossEntropyCall& c) {
  const int64_t V = c.vocabulary;
  for (int64_t p = 0; p < c.rows; ++p) {
    T* x = static_cast<T*>(c.logits) + p * V;
    const int64_t label = c.labels[p];
    const float top = row_maximum(x, V), at_label = as_float(x[label]);
    const float lse = top + logf(mass_of(x, V, top));
    int64_t winner = 0;
    if (at_label == top) {  // otherwise it is not the label, whichever it is
      while (as_float(x[winner]) != top) ++winner;
    }
    c.loss[p] = lse - at_label;
    c.lse[p] = lse;
    c.hits[p] = at_label == top && winner == label;
    if (!c.slopes) continue;
    const Vec by = Vec::set(c.weights[p]), minus = Vec::set(lse);
    for (int64_t i = 0; i < V; i += Vec::width) {
      const int64_t n = V - i;
      store_some(by * exp(load_some(x + i, n) - minus), x + i, n);
    }
    x[label] = as_number<T>(c.weights[p] * (expf(at_label - lse) - 1.0f));
  }
}

}  // namespace

void norm_forward(const NormCall& call) {
  return call.number == Number::f32 ? norm_rows<float>(call) : norm_rows<bf16>(call);
}

bool norm_backward(const NormCall& call) {
  return call.number == Number::f32 ? norm_rows_backward<float>(call)
                                    : norm_rows_backward<bf16>(call);
}

void cross_entropy(const CrossEntropyCall& call) {
  return call.number == Number::f32 ? cross_entropy_rows<float>(call)
                                    : cross_entropy_rows<bf16>(call);
}

void adam(const AdamCall& c) {
  const Vec scale = Vec::set(c.scale), keep = Vec::set(c.keep), a = Vec::set(c.a);
  const Vec b = Vec::set(1.0f - c.b), fresh = Vec::set(c.b), rate = Vec::set(c.rate);
  const Vec size = Vec::set(c.size), epsilon = Vec::set(c.epsilon);
  bf16* working = static_cast<bf16*>(c.working);
  for (int64_t i = 0; i < c.count; i += Vec::width) {
    const int64_t n = c.count - i;
    const Vec g = load_some(c.gradient + i, n) * scale;
    Vec first = load_some(c.first + i, n), second = load_some(c.second + i, n);
    first = fma(a, g - first, first);
    second = fma(fresh, g * g, b * second);
    store_some(first, c.first + i, n);
    store_some(second, c.second + i, n);
    const Vec moved = rate * first / fma(sqrt(second), size, epsilon);
    const Vec master = load_some(c.master + i, n) * keep - moved;
    store_some(master, c.master + i, n);
    if (working) store_some(master, working + i, n);
  }
}

}  // namespace qnext::QNEXT_ISA
