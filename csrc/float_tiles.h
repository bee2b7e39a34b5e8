// Small float32 products in register tiles of kRows rows and V vectors of columns. What happens to a
// tile before and after its sum is the business of a part: a struct whose `run` does R rows from row
// i of V vectors of columns from column c, `tail` numbers in the last vector.
//
// Compiled once per instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace qnext::QNEXT_ISA {

constexpr int kRows = 4;
#if defined(QNEXT_ISA_avx512)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;  // 16 registers
#endif

template <int V, bool kTail>
inline void load(const float* p, int tail, Vec* out) {
  for (int j = 0; j < V; ++j) {
    out[j] = kTail && j == V - 1 ? Vec::load(p + j * Vec::width, tail)
                                 : Vec::load(p + j * Vec::width);
  }
}

template <int V, bool kTail>
inline void store(const Vec* v, float* p, int tail) {
  for (int j = 0; j < V; ++j) {
    if (kTail && j == V - 1) {
      v[j].store(p + j * Vec::width, tail);
    } else {
      v[j].store(p + j * Vec::width);
    }
  }
}

// acc[r][j] += sum over n < depth of a[r * a_row + n * a_depth] * b[n * ldb + column j].
template <int R, int V, bool kTail>
inline void accumulate(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t ldb,
                       int64_t depth, int tail, Vec (*acc)[V]) {
  for (int64_t n = 0; n < depth; ++n) {
    Vec row[V];
    load<V, kTail>(b + n * ldb, tail, row);
    for (int r = 0; r < R; ++r) {
      const Vec x = Vec::set(a[r * a_row + n * a_depth]);
      for (int j = 0; j < V; ++j) acc[r][j] = fma(x, row[j], acc[r][j]);
    }
  }
}

template <int R, int V>
inline void clear(Vec (*acc)[V]) {
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < V; ++j) acc[r][j] = Vec::zero();
  }
}

// The rows of a panel, from the first to the last.
template <int V, bool kTail, class Part>
void down(const Part& part, int64_t rows, int64_t c, int tail) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) part.template run<kRows, V, kTail>(i, c, tail);
  switch (rows - i) {
    case 3: part.template run<3, V, kTail>(i, c, tail); break;
    case 2: part.template run<2, V, kTail>(i, c, tail); break;
    case 1: part.template run<1, V, kTail>(i, c, tail); break;
    default: break;
  }
}

// The same rows from the last to the first.
template <int V, bool kTail, class Part>
void up(const Part& part, int64_t rows, int64_t c, int tail) {
  int64_t i = rows - rows % kRows;
  switch (rows % kRows) {
    case 3: part.template run<3, V, kTail>(i, c, tail); break;
    case 2: part.template run<2, V, kTail>(i, c, tail); break;
    case 1: part.template run<1, V, kTail>(i, c, tail); break;
    default: break;
  }
  for (i -= kRows; i >= 0; i -= kRows) part.template run<kRows, V, kTail>(i, c, tail);
}

// All rows of a panel of V vectors of columns, then the next panel: what is multiplied stays in L1.
template <int V, class Part>
void cover(const Part& part, int64_t rows, int64_t columns) {
  int64_t c = 0;
  for (; c + V * Vec::width <= columns; c += V * Vec::width) {
    down<V, false>(part, rows, c, Vec::width);
  }
  for (; c + Vec::width <= columns; c += Vec::width) down<1, false>(part, rows, c, Vec::width);
  if (c < columns) down<1, true>(part, rows, c, static_cast<int>(columns - c));
}

// Panels in the same order, rows from the last to the first.
template <int V, class Part>
void cover_up(const Part& part, int64_t rows, int64_t columns) {
  int64_t c = 0;
  for (; c + V * Vec::width <= columns; c += V * Vec::width) {
    up<V, false>(part, rows, c, Vec::width);
  }
  for (; c + Vec::width <= columns; c += Vec::width) up<1, false>(part, rows, c, Vec::width);
  if (c < columns) up<1, true>(part, rows, c, static_cast<int>(columns - c));
}

}  // namespace qnext::QNEXT_ISA
