// Products of small matrices for training: operands are rearranged once so that the inner loop only
// multiplies. One 32-bit lane holds a float, or two bf16 numbers that follow each other along the
// depth of the product; sums are float32.
//
// Compiled once per instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace qnext::QNEXT_ISA {

using Lane = uint32_t;

// Numbers of type T along the depth that one lane holds.
template <class T>
constexpr int64_t kPerLane = static_cast<int64_t>(sizeof(Lane) / sizeof(T));

template <class T>
inline int64_t lanes_of(int64_t depth) {
  return (depth + kPerLane<T> - 1) / kPerLane<T>;
}

#if defined(QNEXT_ISA_avx512)

struct LaneVec {
  __m512i v;
  static LaneVec load(const Lane* p) { return {_mm512_loadu_si512(p)}; }
  static LaneVec set(Lane x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
};
template <class T>
inline Vec multiply_add(LaneVec a, LaneVec b, Vec sum) {
  if constexpr (sizeof(T) == 4) {
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(a.v), _mm512_castsi512_ps(b.v), sum.v)};
  } else {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v),
                             reinterpret_cast<__m512bh>(b.v))};
  }
}
constexpr int kTileRows = 6, kTileVectors = 4;

#elif defined(QNEXT_ISA_avx2) || defined(QNEXT_ISA_avx2vnni)

struct LaneVec {
  __m256i v;
  static LaneVec load(const Lane* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static LaneVec set(Lane x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
};
template <class T>
inline Vec multiply_add(LaneVec a, LaneVec b, Vec sum) {
  if constexpr (sizeof(T) == 4) {
    return {_mm256_fmadd_ps(_mm256_castsi256_ps(a.v), _mm256_castsi256_ps(b.v), sum.v)};
  } else {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const __m256 a0 = _mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16));
    const __m256 b0 = _mm256_castsi256_ps(_mm256_slli_epi32(b.v, 16));
    const __m256 a1 = _mm256_castsi256_ps(_mm256_and_si256(a.v, high));
    const __m256 b1 = _mm256_castsi256_ps(_mm256_and_si256(b.v, high));
    return {_mm256_fmadd_ps(a1, b1, _mm256_fmadd_ps(a0, b0, sum.v))};
  }
}
constexpr int kTileRows = 4, kTileVectors = 2;

#else

struct LaneVec {
  Lane v;
  static LaneVec load(const Lane* p) { return {*p}; }
  static LaneVec set(Lane x) { return {x}; }
};
inline float float_of(Lane bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
template <class T>
inline Vec multiply_add(LaneVec a, LaneVec b, Vec sum) {
  if constexpr (sizeof(T) == 4) {
    return {sum.v + float_of(a.v) * float_of(b.v)};
  } else {
    const float first = sum.v + float_of(a.v << 16) * float_of(b.v << 16);
    return {first + float_of(a.v & 0xffff0000u) * float_of(b.v & 0xffff0000u)};
  }
}
constexpr int kTileRows = 4, kTileVectors = 4;

#endif

// Columns of one panel of a packed right operand.
constexpr int64_t kPanel = kTileVectors * Vec::width;

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Lanes of a packed right operand with that many columns and that depth.
template <class T>
inline int64_t packed_lanes(int64_t columns, int64_t depth) {
  return panels_of(columns) * kPanel * lanes_of<T>(depth);
}

template <class T>
inline float as_float(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return from_bf16(x);
  }
}

template <class T>
inline T as_number(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return to_bf16(x);
  }
}

// The first n <= Vec::width numbers as floats, and back.
template <class T>
inline Vec load_some(const T* p, int64_t n) {
  if (n >= Vec::width) return Vec::load(p);
  float part[Vec::width] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = as_float(p[i]);
  return Vec::load(part);
}

template <class T>
inline void store_some(Vec v, T* p, int64_t n) {
  if (n >= Vec::width) return v.store(p);
  float part[Vec::width];
  v.store(part);
  for (int64_t i = 0; i < n; ++i) p[i] = as_number<T>(part[i]);
}

// -- packing ---------------------------------------------------------------------------------------

// Rows that lie along the depth, n of them with `columns` numbers, into panels of `panel` columns:
// lane [p][j] of a panel holds column j of the rows of lane p. Missing rows and columns are zero.
// With panel = columns the result is one array [lanes][columns], which can be a left operand too.
template <class T>
void pack_rows(const T* const* rows, int64_t n, int64_t columns, int64_t panel, Lane* out) {
  const int64_t depth = lanes_of<T>(n);
  for (int64_t c = 0; c < columns; c += panel) {
    const int64_t here = columns - c < panel ? columns - c : panel;
    for (int64_t p = 0; p < depth; ++p) {
      Lane* to = out + p * panel;
      if constexpr (sizeof(T) == 4) {
        memcpy(to, rows[p] + c, static_cast<size_t>(here) * 4);
      } else {
        const T* a = rows[2 * p] + c;
        if (2 * p + 1 < n) {
          const T* b = rows[2 * p + 1] + c;
          for (int64_t j = 0; j < here; ++j) {
            to[j] = static_cast<Lane>(a[j]) | static_cast<Lane>(b[j]) << 16;
          }
        } else {
          for (int64_t j = 0; j < here; ++j) to[j] = a[j];
        }
      }
      for (int64_t j = here; j < panel; ++j) to[j] = 0;
    }
    out += depth * panel;
  }
}

#if defined(QNEXT_ISA_avx512)
// 16 rows of 16 lanes, turned.
inline void turn16(const Lane* from, int64_t stride, Lane* to, int64_t to_stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#endif

// to[j][i] = from[i][j] for i < rows, j < columns; strides in lanes.
inline void turn(const Lane* from, int64_t stride, int64_t rows, int64_t columns, Lane* to,
                 int64_t to_stride) {
  int64_t i = 0;
#if defined(QNEXT_ISA_avx512)
  for (; i + 16 <= rows; i += 16) {
    int64_t j = 0;
    for (; j + 16 <= columns; j += 16) {
      turn16(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
    }
    for (; j < columns; ++j) {
      for (int64_t n = i; n < i + 16; ++n) to[j * to_stride + n] = from[n * stride + j];
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * stride + j];
  }
}

// A matrix [columns][depth] whose rows run along the depth, `stride` numbers apart, into panels: the
// right operand of a product with its transpose. Depth and stride are multiples of kPerLane<T>;
// missing columns are zero.
template <class T>
void pack_columns(const T* x, int64_t columns, int64_t depth, int64_t stride, Lane* out) {
  const int64_t lanes = depth / kPerLane<T>, step = stride / kPerLane<T>;
  const Lane* from = reinterpret_cast<const Lane*>(x);
  for (int64_t c = 0; c < columns; c += kPanel) {
    const int64_t here = columns - c < kPanel ? columns - c : kPanel;
    turn(from + c * step, step, here, lanes, out, kPanel);
    for (int64_t p = 0; p < lanes && here < kPanel; ++p) {
      for (int64_t j = here; j < kPanel; ++j) out[p * kPanel + j] = 0;
    }
    out += lanes * kPanel;
  }
}

// -- the product -----------------------------------------------------------------------------------

// What becomes of a sum: written as float, added to a float, or rounded to the operands' type.
enum class Put { set, add, round };

// Memory that is asked for while a product runs, because what follows reads or writes it: some lines
// with every tile.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t lines = 0;  // with each tile
  bool write = false;

  template <class T>
  static Ahead of(const T* p, int64_t count, int64_t tiles, bool write) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    const char* start = reinterpret_cast<const char*>(p);
    return {start, start + bytes, bytes / 64 / (tiles > 0 ? tiles : 1) + 1, write};
  }
  void some() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) {
      if (write) {
        __builtin_prefetch(at, 1, 2);
      } else {
        __builtin_prefetch(at, 0, 2);
      }
    }
  }
};

// Rows of the left operand: lane p of row i is rows[i][p * step].
struct Left {
  const Lane* const* rows;
  int64_t step;
};

template <class T, int R, int V>
void product_tile(const Lane* const* a, int64_t step, const Lane* b, int64_t lanes, int64_t column,
                  int64_t columns, void* const* out, Put put) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = Vec::zero();
  }
  const Lane* left[R];
  for (int r = 0; r < R; ++r) left[r] = a[r];
  if (put == Put::add) {  // what is added to is often far away
    for (int r = 0; r < R; ++r) {
      const float* to = static_cast<const float*>(out[r]) + column;
      for (int v = 0; v < V; ++v) __builtin_prefetch(to + v * Vec::width, 1, 3);
    }
  }
  for (int64_t p = 0; p < lanes; ++p) {
    LaneVec right[V];
    for (int v = 0; v < V; ++v) right[v] = LaneVec::load(b + p * kPanel + v * Vec::width);
    for (int r = 0; r < R; ++r) {
      const LaneVec x = LaneVec::set(left[r][p * step]);
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add<T>(x, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = column + v * Vec::width;
      const int64_t n = columns - at;
      if (put == Put::round) {
        store_some(sum[r][v], static_cast<T*>(out[r]) + at, n);
      } else {
        float* to = static_cast<float*>(out[r]) + at;
        store_some(put == Put::add ? load_some(to, n) + sum[r][v] : sum[r][v], to, n);
      }
    }
  }
}

template <class T, int V>
void product_panel(Left a, const Lane* b, int64_t lanes, int64_t rows, int64_t column,
                   int64_t columns, void* const* out, Put put, Ahead& ahead) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    ahead.some();
    product_tile<T, kTileRows, V>(a.rows + i, a.step, b, lanes, column, columns, out + i, put);
  }
  if constexpr (kTileRows > 4) {
    for (; i + 4 <= rows; i += 4) {
      product_tile<T, 4, V>(a.rows + i, a.step, b, lanes, column, columns, out + i, put);
    }
  }
  for (; i + 2 <= rows; i += 2) {
    product_tile<T, 2, V>(a.rows + i, a.step, b, lanes, column, columns, out + i, put);
  }
  if (i < rows) {
    product_tile<T, 1, V>(a.rows + i, a.step, b, lanes, column, columns, out + i, put);
  }
}

// Tiles of a product, but for what is left over.
inline int64_t tiles_of(int64_t rows, int64_t columns) {
  return rows / kTileRows * panels_of(columns);
}

// out[i][j] (=, += or rounded) sum over lanes p of a[i][p] . packed[p][j], for rows x columns.
template <class T>
void product(Left a, const Lane* packed, int64_t lanes, int64_t rows, int64_t columns,
             void* const* out, Put put, Ahead ahead = {}) {
  for (int64_t c = 0; c < columns; c += kPanel) {
    if (c + kPanel <= columns) {
      product_panel<T, kTileVectors>(a, packed, lanes, rows, c, columns, out, put, ahead);
    } else {
      for (int64_t v = 0; c + v < columns; v += Vec::width) {
        product_panel<T, 1>(a, packed + v, lanes, rows, c + v, columns, out, put, ahead);
      }
    }
    packed += lanes * kPanel;
  }
}

}  // namespace qnext::QNEXT_ISA
