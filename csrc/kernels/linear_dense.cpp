// Products with f32 and bf16 matrices as checkpoints store them. A vector runs along the columns:
// every lane adds its columns in rising order, then the lanes are added in one fixed order,
// whatever the number of rows and activations that are computed together.
#include "linear_rows.h"

namespace qnext::QNEXT_ISA {
namespace {

#if defined(QNEXT_ISA_avx512)

struct F32 {
  using Weight = float;
  using Input = float;
  static constexpr int step = 16;
  using Part = __m512;
  static Part load(const float* p) { return _mm512_loadu_ps(p); }
  static Part load(const float* p, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
  }
  static Part input(const float* p) { return _mm512_loadu_ps(p); }
  static Vec add(Vec sum, Part w, Part x) { return {_mm512_fmadd_ps(w, x, sum.v)}; }
};

struct Bf16 {
  using Weight = bf16;
  using Input = bf16;
  static constexpr int step = 32;
  using Part = __m512i;
  static Part load(const bf16* p) { return _mm512_loadu_si512(p); }
  static Part load(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1u), p);
  }
  static Part input(const bf16* p) { return _mm512_loadu_si512(p); }
  static Vec add(Vec sum, Part w, Part x) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))};
  }
};

using Sum = Vec;
// Lanes 8 apart first, then 4, 2 and 1.
float total(Sum s) {
  __m512 x = _mm512_add_ps(s.v, _mm512_shuffle_f32x4(s.v, s.v, 0x4e));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0x4e));
  return _mm512_cvtss_f32(_mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0xb1)));
}
// Four totals at once, of the same additions.
void totals(Sum a, Sum b, Sum c, Sum d, float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44),
                                  _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44),
                                  _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),
                           _mm512_shuffle_f32x4(ab, cd, 0xdd));
  x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0x4e));
  x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, x)));
}
constexpr int kRows = 4, kTokens = 6;

#elif defined(QNEXT_ISA_avx2) || defined(QNEXT_ISA_avx2vnni)

struct F32 {
  using Weight = float;
  using Input = float;
  static constexpr int step = 8;
  using Part = Vec;
  static Part load(const float* p) { return Vec::load(p); }
  static Part load(const float* p, int n) { return Vec::load(p, n); }
  static Part input(const float* p) { return Vec::load(p); }
  static Vec add(Vec sum, Part w, Part x) { return fma(w, x, sum); }
};

struct Bf16 {
  using Weight = bf16;
  using Input = float;
  static constexpr int step = 8;
  using Part = Vec;
  static Part load(const bf16* p) { return Vec::load(p); }
  static Part load(const bf16* p, int n) {
    bf16 part[8] = {};
    memcpy(part, p, static_cast<size_t>(n) * 2);
    return Vec::load(part);
  }
  static Part input(const float* p) { return Vec::load(p); }
  static Vec add(Vec sum, Part w, Part x) { return fma(w, x, sum); }
};

using Sum = Vec;
float total(Sum s) { return s.sum(); }
void totals(Sum a, Sum b, Sum c, Sum d, float* out) {
  out[0] = total(a);
  out[1] = total(b);
  out[2] = total(c);
  out[3] = total(d);
}
constexpr int kRows = 4, kTokens = 2;

#else

// Eight lanes that a compiler can map to whatever vectors there are.
struct Lanes {
  float v[8];
  static Lanes zero() { return {}; }
};

template <class T>
struct Plain {
  using Weight = T;
  using Input = float;
  static constexpr int step = 8;
  using Part = Lanes;
  static float value(float x) { return x; }
  static float value(bf16 x) { return from_bf16(x); }
  static Lanes load(const T* p) {
    Lanes lanes;
    for (int i = 0; i < 8; ++i) lanes.v[i] = value(p[i]);
    return lanes;
  }
  static Lanes load(const T* p, int n) {
    Lanes lanes = {};
    for (int i = 0; i < n; ++i) lanes.v[i] = value(p[i]);
    return lanes;
  }
  static Lanes input(const float* p) {
    Lanes lanes;
    memcpy(lanes.v, p, sizeof(lanes.v));
    return lanes;
  }
  static Lanes add(Lanes sum, Lanes w, Lanes x) {
    for (int i = 0; i < 8; ++i) sum.v[i] += w.v[i] * x.v[i];
    return sum;
  }
};
using F32 = Plain<float>;
using Bf16 = Plain<bf16>;

using Sum = Lanes;
float total(Sum s) {
  return ((s.v[0] + s.v[4]) + (s.v[2] + s.v[6])) + ((s.v[1] + s.v[5]) + (s.v[3] + s.v[7]));
}
constexpr int kRows = 2, kTokens = 2;

#endif

// What to ask for while other work goes on: `lines` lines per step along the columns.
struct Ahead {
  const char* at = nullptr;
  int lines = 0;
  bool once = false;  // the weights pass only once
};

// Lines of weights that a step along the columns of kRows rows reads.
template <class K>
constexpr int kPace =
    (kRows * K::step * static_cast<int>(sizeof(typename K::Weight)) + 63) / 64;

// At least so far ahead, where the weights pass only once.
constexpr int64_t kLeadBytes = 8192;
// One activation alone: shorter rows are read fast enough as they are.
constexpr int64_t kLongRow = 4096;

// A few rows of W times a few rows of x. What comes next in memory is asked for in one stream: the
// rows themselves are too many and too short for the processor to foresee.
template <class K, int R, int T>
void corner(const typename K::Weight* w, int64_t cols, const typename K::Input* const* x,
            float* const* out, int64_t r, Ahead ahead) {
  Sum sum[R][T];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[i][t] = Sum::zero();
  }
  const typename K::Input* in[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    in[t] = x[t];
    __builtin_prefetch(out[t] + r, 1, 3);
  }
  int64_t k = 0;
  for (; k + K::step <= cols; k += K::step) {
    if (ahead.lines > 0) {
      if (ahead.once) {
        // The rows that follow at once: into the first-level cache. Of one activation alone they
        // need not stay anywhere else, there is better use for it.
#pragma GCC unroll 4
        for (int i = 0; i < kPace<K>; ++i) {
          __builtin_prefetch(ahead.at + i * 64, 0, T == 1 ? 0 : 3);
        }
      } else {
        __builtin_prefetch(ahead.at, 0, 2);
        if (ahead.lines > 1) __builtin_prefetch(ahead.at + 64, 0, 2);
      }
      ahead.at += ahead.lines * 64;
    }
    typename K::Part parts[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) parts[i] = K::load(w + i * cols + k);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const typename K::Part value = K::input(in[t] + k);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum[i][t] = K::add(sum[i][t], parts[i], value);
    }
  }
  if (k < cols) {
    const int rest = static_cast<int>(cols - k);
    for (int i = 0; i < R; ++i) {
      const typename K::Part part = K::load(w + i * cols + k, rest);
      for (int t = 0; t < T; ++t) sum[i][t] = K::add(sum[i][t], part, K::input(in[t] + k));
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    if constexpr (R == 4) {
      totals(sum[0][t], sum[1][t], sum[2][t], sum[3][t], out[t] + r);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) out[t][r + i] = total(sum[i][t]);
    }
  }
}

template <class K, int R>
void corner_of(int tokens, const typename K::Weight* w, int64_t cols,
               const typename K::Input* const* x, float* const* out, int64_t r, Ahead ahead) {
  if constexpr (kTokens > 2) {
    if (tokens == 6) return corner<K, R, 6>(w, cols, x, out, r, ahead);
    if (tokens == 5) return corner<K, R, 5>(w, cols, x, out, r, ahead);
    if (tokens == 4) return corner<K, R, 4>(w, cols, x, out, r, ahead);
    if (tokens == 3) return corner<K, R, 3>(w, cols, x, out, r, ahead);
  }
  if (tokens == 2) return corner<K, R, 2>(w, cols, x, out, r, ahead);
  corner<K, R, 1>(w, cols, x, out, r, ahead);
}

template <class K>
void multiply_rows(const Matrix& w, const char* prepared, const int32_t* index, int64_t count,
                   float* out, int64_t ldo, int64_t first, int64_t last) {
  const auto* weights = static_cast<const typename K::Weight*>(w.data);
  const int64_t cols = w.cols;
  const int64_t stride =
      odd_lines(padded(cols) * static_cast<int64_t>(sizeof(typename K::Input)));
  const int64_t row_bytes = cols * static_cast<int64_t>(sizeof(typename K::Weight));
  const int64_t panels = (count + kTokens - 1) / kTokens;
  // As many rows of W as stay in the second-level cache while all activations pass, and with them
  // the next ones, which are asked for meanwhile.
  const bool asks = count > 1 || row_bytes >= kLongRow;
  const bool once = panels == 1 && asks;
  int64_t strip = 256 * 1024 / (row_bytes > 0 ? row_bytes : 1) / kRows * kRows;
  if (strip < kRows || once) strip = kRows;
  const int lines = !asks ? 0 : once ? kPace<K> : panels <= 3 ? 2 : 1;
  // Memory answers late: with short rows, those that follow at once would come too late.
  const int64_t lead = once && row_bytes > 0 ? (kLeadBytes + row_bytes - 1) / row_bytes : 0;
  for (int64_t r0 = first; r0 < last; r0 += strip) {
    const int64_t r1 = r0 + strip < last ? r0 + strip : last;
    const int64_t from = r0 + (lead > strip ? lead : strip);
    const char* next = reinterpret_cast<const char*>(weights + (from < last ? from : last) * cols);
    const char* end = next + (last - from < strip ? last - from : strip) * row_bytes;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t i0 = count * panel / panels, i1 = count * (panel + 1) / panels;
      const int tokens = static_cast<int>(i1 - i0);
      const typename K::Input* x[kTokens];
      float* to[kTokens];
      for (int t = 0; t < tokens; ++t) {
        const int64_t row = index ? index[i0 + t] : i0 + t;
        x[t] = reinterpret_cast<const typename K::Input*>(prepared + row * stride);
        to[t] = out + (i0 + t) * ldo;
      }
      int64_t r = r0;
      for (; r + kRows <= r1; r += kRows) {
        const Ahead ahead = {next, next < end ? lines : 0, once};
        corner_of<K, kRows>(tokens, weights + r * cols, cols, x, to, r, ahead);
        next += ahead.lines * (cols / K::step) * 64;
      }
      for (; r < r1; ++r) corner_of<K, 1>(tokens, weights + r * cols, cols, x, to, r, {});
    }
  }
}

}  // namespace

void multiply_dense(const Matrix& w, const void* prepared, const int32_t* index, int64_t count,
                    float* out, int64_t ldo, int64_t first, int64_t last) {
  const char* rows = static_cast<const char*>(prepared);
  if (w.format == Format::f32) {
    multiply_rows<F32>(w, rows, index, count, out, ldo, first, last);
  } else {
    multiply_rows<Bf16>(w, rows, index, count, out, ldo, first, last);
  }
}

}  // namespace qnext::QNEXT_ISA
