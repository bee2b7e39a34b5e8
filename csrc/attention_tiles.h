// Small products for attention: a few rows of queries or probabilities times a packed panel of keys
// or values. Every row's sums run over the panel in order, in one accumulator, so a row's result
// does not depend on the rows beside it. Included by kernels only, once per instruction set.
#pragma once

#include "simd.h"

namespace qnext::QNEXT_ISA {

// A panel is as wide as two vectors (scalar: eight numbers, so that the compiler can vectorise).
// kMostRows of them fill the registers; kFewerRows are taken where they divide the rest better.
#if defined(QNEXT_ISA_scalar)
constexpr int kVectors = 8, kMostRows = 4, kFewerRows = 3;
#elif defined(QNEXT_ISA_avx512)
constexpr int kVectors = 2, kMostRows = 12, kFewerRows = 8;
#else
constexpr int kVectors = 2, kMostRows = 6, kFewerRows = 4;
#endif
constexpr int kPanel = kVectors * Vec::width;

#if defined(QNEXT_ISA_avx512)

inline void transpose(Vec* r) {
  __m512 t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(t[4 * i + half]);
      const __m512d b = _mm512_castps_pd(t[4 * i + 2 + half]);
      u[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(QNEXT_ISA_avx2) || defined(QNEXT_ISA_avx2vnni)

inline void transpose(Vec* r) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    for (int half = 0; half < 2; ++half) {
      const __m256d a = _mm256_castps_pd(t[4 * i + half]);
      const __m256d b = _mm256_castps_pd(t[4 * i + 2 + half]);
      u[4 * i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      u[4 * i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

#else

inline void transpose(Vec*) {}

#endif

// 2^x for x <= 0, never below 2^-126; NaN stays NaN. Error 2e-7 relative.
inline Vec exp2_negative(Vec x) {
#if defined(QNEXT_ISA_scalar)
  return {exp2f(x.v < -126.0f ? -126.0f : x.v)};
#else
  const Vec clamped = max(Vec::set(-126.0f), x);
  const Vec n = round(clamped);
  const Vec r = clamped - n;
  // The Taylor polynomial of degree 6 of exp(r ln 2), |r| <= 1/2.
  Vec p = Vec::set(1.5403530393381609e-4f);
  p = fma(p, r, Vec::set(1.3333558146428443e-3f));
  p = fma(p, r, Vec::set(9.6181291076284772e-3f));
  p = fma(p, r, Vec::set(5.5504108664821580e-2f));
  p = fma(p, r, Vec::set(2.4022650695910071e-1f));
  p = fma(p, r, Vec::set(6.9314718055994531e-1f));
  p = fma(p, r, Vec::set(1.0f));
  return scale_by_power(p, n);
#endif
}

inline Vec load_part(const float* p, int n) { return Vec::load(p, n); }
inline Vec load_part(const bf16* p, int n) {
  bf16 full[Vec::width] = {};
  memcpy(full, p, sizeof(bf16) * n);
  return Vec::load(full);
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) { *p = to_bf16(x); }

// Products in float32; keys and values are converted while they are packed. `T` is what the cache
// holds. A "step" is what one multiplication takes from a row: one float, or a pair of bf16.
template <class T>
struct Floats {
  using Cache = T;
  static constexpr int kStep = 1;

  // H values of a row, from float32.
  static void pack_row(const float* x, int64_t size, uint32_t* out) {
    memcpy(out, x, sizeof(float) * size);
  }

  static Vec load(const T* p) { return Vec::load(p); }
  static Vec load(const T* p, int n) { return load_part(p, n); }

  // Columns [column, column + kPanel) of the values of one position; zeros from `size` on.
  struct Values {
    const void* const* rows;
    int64_t column;
    int64_t size;
    void next(Vec* panel) {
      const T* const row = static_cast<const T*>(*rows++);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = column + v * Vec::width;
        const int64_t left = size - at;
        panel[v] = left >= Vec::width ? Vec::load(row + at)
                   : left > 0         ? load_part(row + at, static_cast<int>(left))
                                      : Vec::zero();
      }
    }
  };

  // Probabilities in place; returns their sum.
  static Vec pack_probabilities(float* p, int count) {
    Vec sum = Vec::zero();
    for (int j = 0; j < count; j += Vec::width) sum = sum + Vec::load(p + j);
    return sum;
  }

  static Vec multiply(const uint32_t* a, Vec b, Vec sum) {
    float x;
    memcpy(&x, a, sizeof(x));
#if defined(QNEXT_ISA_scalar)
    return Vec::set(x) * b + sum;
#else
    return fma(Vec::set(x), b, sum);
#endif
  }
};

#if defined(QNEXT_ISA_avx512)

// Products of bf16 pairs, summed in float32.
struct Pairs {
  using Cache = bf16;
  static constexpr int kStep = 2;

  static void pack_row(const float* x, int64_t size, uint32_t* out) {
    bf16* y = reinterpret_cast<bf16*>(out);
    int64_t d = 0;
    for (; d + Vec::width <= size; d += Vec::width) Vec::load(x + d).store(y + d);
    for (; d < size; ++d) y[d] = to_bf16(x[d]);
  }

  // A vector of pairs, `n` of them.
  static Vec load(const bf16* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p)};
  }

  // The values of two positions, interleaved: pairs along the positions.
  struct Values {
    const void* const* rows;
    int64_t column;
    __mmask32 mask;
    __m512i low, high;
    Values(const void* const* rows, int64_t column, int64_t size) : rows(rows), column(column) {
      mask = size - column >= kPanel ? 0xffffffffu
                                     : static_cast<__mmask32>((1u << (size - column)) - 1u);
      low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                             38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    }
    void next(Vec* panel) {
      const __m512i a = _mm512_maskz_loadu_epi16(mask, static_cast<const bf16*>(rows[0]) + column);
      const __m512i b = _mm512_maskz_loadu_epi16(mask, static_cast<const bf16*>(rows[1]) + column);
      rows += 2;
      panel[0].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
      panel[1].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
    }
  };

  // The sum is that of the rounded probabilities, so that the weights of the values add up to 1.
  static Vec pack_probabilities(float* p, int count) {
    Vec sum = Vec::zero();
    bf16* packed = reinterpret_cast<bf16*>(p);
    for (int j = 0; j < count; j += Vec::width) {
      Vec::load(p + j).store(packed + j);
      sum = sum + Vec::load(packed + j);
    }
    return sum;
  }

  static Vec multiply(const uint32_t* a, Vec b, Vec sum) {
    int pair;
    memcpy(&pair, a, sizeof(pair));
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)b.v, (__m512bh)_mm512_set1_epi32(pair))};
  }
};

#endif

// Memory that will be needed soon: `bytes` of each of some rows. It is asked for a few lines at a
// time during products, in the order of addresses: so the processor's own prefetcher joins in, and
// the memory works while products do. Requests for the first cache are never dropped but few can
// be under way; those for the second, well ahead, are dropped when there are too many: together
// they keep the memory busy without holding up the products.
struct Ahead {
  const void* const* row = nullptr;
  const void* const* end = nullptr;
  int64_t bytes = 0;
  int64_t at = 0;
  int64_t far = 0;  // rows

  Ahead(const void* const* rows, int64_t count, int64_t bytes)
      : row(rows), end(rows + count), bytes(bytes), far(bytes < 8192 ? 8192 / bytes : 1) {}
  Ahead() = default;

  bool pending() const { return row != end; }

  void fetch() {
    if (row == end) return;
    __builtin_prefetch(static_cast<const char*>(*row) + at, 0, 3);
    if (end - row > far) __builtin_prefetch(static_cast<const char*>(row[far]) + at, 0, 2);
    at += 64;
    if (at >= bytes) {
      at = 0;
      ++row;
    }
  }

  void fetch_rest() {
    while (pending()) fetch();
  }
};

// A panel that was packed before.
struct Packed {
  const float* at;
  void next(Vec* panel) {
    for (int v = 0; v < kVectors; ++v) panel[v] = Vec::load(at + v * Vec::width);
    at += kPanel;
  }
};

// Keys: kPanel rows of `steps` steps from value `offset` on, transposed: [step][row].
template <class Kind>
inline void pack_keys(const void* const* rows, int64_t offset, int64_t steps, float* out,
                      Ahead* ahead) {
  constexpr int W = Vec::width;
  auto row = [&](int r) {
    return static_cast<const typename Kind::Cache*>(rows[r]) + offset;
  };
  for (int v = 0; v < kVectors; ++v, rows += W, out += W) {
    int64_t s = 0;
    Vec square[W];
    for (; s + W <= steps; s += W) {
      for (int r = 0; r < W; ++r) square[r] = Kind::load(row(r) + s * Kind::kStep);
      transpose(square);
      for (int i = 0; i < W; ++i) square[i].store(out + (s + i) * kPanel);
      if (ahead->pending()) {
        for (int i = 0; i < W / 2 + 1; ++i) ahead->fetch();
      }
    }
    const int rest = static_cast<int>(steps - s);
    if (rest) {
      for (int r = 0; r < W; ++r) square[r] = Kind::load(row(r) + s * Kind::kStep, rest);
      transpose(square);
      for (int i = 0; i < rest; ++i) square[i].store(out + (s + i) * kPanel);
    }
  }
}

// c[i][panel] = a[i][:] . panel (+ c[i][panel] * keep[i] where `keep` is given), for R rows.
// Fetches `Fetch` lines per step.
template <class Kind, int R, int Fetch, class Panel>
inline void multiply_rows(const uint32_t* a, int64_t lda, Panel source, int64_t steps, float* c,
                          int64_t ldc, const float* keep, Ahead* ahead) {
  Vec sums[R][kVectors];
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Vec::zero();
  }
  Ahead lines = Fetch ? *ahead : Ahead();
  for (int64_t s = 0; s < steps; ++s, ++a) {
    for (int i = 0; i < Fetch; ++i) lines.fetch();
    Vec panel[kVectors];
    source.next(panel);
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = Kind::multiply(a + i * lda, panel[v], sums[i][v]);
      }
    }
  }
  if (Fetch) *ahead = lines;
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + i * ldc + v * Vec::width;
      if (keep) sums[i][v] = fma(Vec::load(at), Vec::set(keep[i]), sums[i][v]);
      sums[i][v].store(at);
    }
  }
}

// Rows that are multiplied at once when `left` are to be done.
inline int64_t rows_at_once(int64_t left) {
  if (left >= kMostRows && left != 2 * kFewerRows) return kMostRows;
  if (left >= kFewerRows) return kFewerRows;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// multiply_rows for a number of rows that rows_at_once gave.
template <class Kind, int Fetch, class Panel>
inline void multiply_some(const uint32_t* a, int64_t lda, Panel source, int64_t steps, float* c,
                          int64_t ldc, const float* keep, int64_t rows, Ahead* ahead) {
  if (rows == kMostRows) {
    multiply_rows<Kind, kMostRows, Fetch>(a, lda, source, steps, c, ldc, keep, ahead);
  } else if (rows == kFewerRows) {
    multiply_rows<Kind, kFewerRows, Fetch>(a, lda, source, steps, c, ldc, keep, ahead);
  } else if (rows == 4) {
    multiply_rows<Kind, 4, Fetch>(a, lda, source, steps, c, ldc, keep, ahead);
  } else if (rows == 2) {
    multiply_rows<Kind, 2, Fetch>(a, lda, source, steps, c, ldc, keep, ahead);
  } else {
    multiply_rows<Kind, 1, Fetch>(a, lda, source, steps, c, ldc, keep, ahead);
  }
}

// Scores of any number of rows with the packed keys of a panel.
template <class Kind>
inline void multiply_keys(const uint32_t* a, int64_t lda, const float* panel, int64_t steps,
                          float* c, int64_t ldc, int64_t rows, Ahead* ahead) {
  const Packed source{panel};
  for (int64_t i = 0, taken; i < rows; i += taken) {
    taken = rows_at_once(rows - i);
    if (ahead->pending()) {
      multiply_some<Kind, 1>(a + i * lda, lda, source, steps, c + i * ldc, ldc, nullptr, taken,
                             ahead);
    } else {
      multiply_some<Kind, 0>(a + i * lda, lda, source, steps, c + i * ldc, ldc, nullptr, taken,
                             ahead);
    }
  }
}

// c = c * keep + a . values, for any number of rows. The values are packed into `panel` first where
// several groups of rows use them.
template <class Kind>
inline void multiply_values(const uint32_t* a, int64_t lda, typename Kind::Values values,
                            float* panel, int64_t steps, float* c, int64_t ldc, const float* keep,
                            int64_t rows, Ahead* ahead) {
  if (rows_at_once(rows) == rows) {
    multiply_some<Kind, 2>(a, lda, values, steps, c, ldc, keep, rows, ahead);
    return;
  }
  for (int64_t s = 0; s < steps; ++s) {
    Vec wide[kVectors];
    values.next(wide);
    for (int v = 0; v < kVectors; ++v) wide[v].store(panel + s * kPanel + v * Vec::width);
  }
  const Packed source{panel};
  for (int64_t i = 0, taken; i < rows; i += taken) {
    const float* kept = keep ? keep + i : nullptr;
    taken = rows_at_once(rows - i);
    if (ahead->pending()) {
      multiply_some<Kind, 2>(a + i * lda, lda, source, steps, c + i * ldc, ldc, kept, taken, ahead);
    } else {
      multiply_some<Kind, 0>(a + i * lda, lda, source, steps, c + i * ldc, ldc, kept, taken, ahead);
    }
  }
}

}  // namespace qnext::QNEXT_ISA
