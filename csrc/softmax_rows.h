// What a softmax needs of a row of numbers of either type.
#pragma once

#include <math.h>

#include "packed_product.h"

namespace qnext::QNEXT_ISA {
namespace {

template <class T>
float row_maximum(const T* x, int64_t count) {
  Vec top = Vec::set(-INFINITY);
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) top = max(top, Vec::load(x + i));
  float best = top.max();
  for (; i < count; ++i) best = as_float(x[i]) > best ? as_float(x[i]) : best;
  return best;
}

// The sum of exp(x - top).
template <class T>
float mass_of(const T* x, int64_t count, float top) {
  const Vec minus = Vec::set(top);
  Vec sum = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) sum = sum + exp(Vec::load(x + i) - minus);
  float total = sum.sum();
  for (; i < count; ++i) total += expf(as_float(x[i]) - top);
  return total;
}

}  // namespace
}  // namespace qnext::QNEXT_ISA
