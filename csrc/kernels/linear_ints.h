// The integer products of q8 and q4 for each instruction set. A vector has one lane per row of W;
// `w` holds four unsigned weights a lane, `a` the four activations of those columns in every lane.
#pragma once

#include "simd.h"

namespace qnext::QNEXT_ISA {

#if defined(QNEXT_ISA_avx512)

constexpr int kLanes = 16;
using Ints = __m512i;
using Bytes = __m512i;

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Ints everywhere(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
// gcc 12 would load weights again for every row of activations: loads are what is scarce.
inline void hold(Bytes& b) { __asm__("" : "+v"(b)); }
// Written as assembly because gcc 12 spills the sums of the intrinsic when there are many.
inline Ints dot4(Ints sum, Bytes w, Ints a) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
  return sum;
}
inline Ints dot4(Ints sum, Bytes w, const char* a) { return dot4(sum, w, everywhere(a)); }
inline Bytes low(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high(Bytes b) {
  return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15));
}
// Sums of a group fit 16 bits: one 16-bit product multiplies them with the scale and adds.
using Scales = __m512i;
inline Scales load_scales(const uint8_t* p) {
  const __m128i s = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_and_si512(_mm512_cvtepi8_epi32(s), _mm512_set1_epi32(0xffff));
}
inline Ints group4(Ints sum, Bytes w, Ints a) { return dot4(sum, w, a); }
inline Ints scaled(Ints sum, Ints group, Scales s) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(group), "v"(s));
  return sum;
}
using Floats = Vec;
inline Floats to_floats(Ints x) { return {_mm512_cvtepi32_ps(x)}; }

#elif defined(QNEXT_ISA_avx2) || defined(QNEXT_ISA_avx2vnni)

constexpr int kLanes = 8;
using Ints = __m256i;
using Bytes = __m256i;
using Scales = __m256i;
using Floats = Vec;

inline Bytes load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Ints everywhere(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
inline Ints no_ints() { return _mm256_setzero_si256(); }
inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline void hold(Bytes&) {}
inline Bytes low(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline Bytes high(Bytes b) {
  return _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(15));
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x)}; }

#if defined(QNEXT_ISA_avx2vnni)
inline Ints dot4(Ints sum, Bytes w, Ints a) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(a));
  return sum;
}
inline Ints dot4(Ints sum, Bytes w, const char* a) { return dot4(sum, w, everywhere(a)); }
inline Ints group4(Ints sum, Bytes w, Ints a) { return dot4(sum, w, a); }
inline Scales load_scales(const uint8_t* p) {
  const __m128i s = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_and_si256(_mm256_cvtepi8_epi32(s), _mm256_set1_epi32(0xffff));
}
inline Ints scaled(Ints sum, Ints group, Scales s) {
  __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(group), "x"(s));
  return sum;
}
#else
// Weights as 16-bit numbers, columns 0 and 2, then 1 and 3: `a` has the same order.
inline Ints dot4(Ints sum, Bytes w, const char* a) {
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255));
  const __m256i odd = _mm256_srli_epi16(w, 8);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, everywhere(a)),
                                                _mm256_madd_epi16(odd, everywhere(a + 4))));
}
// A group of 16 sums to at most 8 * 15 * 127 in each half of a lane: 16 bits are enough.
inline Ints group4(Ints sum, Bytes w, Ints a) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a));
}
inline Scales load_scales(const uint8_t* p) {
  const __m128i s = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m256i low_half = _mm256_and_si256(_mm256_cvtepi8_epi32(s), _mm256_set1_epi32(0xffff));
  return _mm256_or_si256(low_half, _mm256_slli_epi32(low_half, 16));
}
inline Ints scaled(Ints sum, Ints group, Scales s) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(group, s));
}
#endif

#else

constexpr int kLanes = 16;
struct Ints {
  int32_t v[kLanes];
};
struct Bytes {
  uint8_t v[kLanes * 4];
};
using Scales = Ints;
struct Floats {
  float v[kLanes];
  static Floats zero() { return {}; }
  static Floats set(float x) {
    Floats r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = x;
    return r;
  }
  static Floats load(const float* p) {
    Floats r;
    memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  void store(float* p) const { memcpy(p, v, sizeof(v)); }
  void store(float* p, int n) const { memcpy(p, v, static_cast<size_t>(n) * 4); }
};
inline Floats operator*(Floats a, Floats b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Floats fma(Floats a, Floats b, Floats c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline Floats to_floats(Ints x) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<float>(x.v[i]);
  return r;
}

inline Bytes load_bytes(const uint8_t* p) {
  Bytes b;
  memcpy(b.v, p, sizeof(b.v));
  return b;
}
inline Ints everywhere(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  Ints r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = x;
  return r;
}
inline Ints no_ints() { return {}; }
inline Ints plus(Ints a, Ints b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints dot4(Ints sum, Bytes w, const char* a) {
  int8_t x[4];
  memcpy(x, a, 4);
  for (int i = 0; i < kLanes; ++i) {
    sum.v[i] += w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] +
                w.v[4 * i + 3] * x[3];
  }
  return sum;
}
inline Ints group4(Ints sum, Bytes w, Ints a) {
  return dot4(sum, w, reinterpret_cast<const char*>(a.v));
}
inline void hold(Bytes&) {}
inline Bytes low(Bytes b) {
  for (int i = 0; i < kLanes * 4; ++i) b.v[i] &= 15;
  return b;
}
inline Bytes high(Bytes b) {
  for (int i = 0; i < kLanes * 4; ++i) b.v[i] >>= 4;
  return b;
}
inline Scales load_scales(const uint8_t* p) {
  Scales s;
  for (int i = 0; i < kLanes; ++i) s.v[i] = static_cast<int8_t>(p[i]);
  return s;
}
inline Ints scaled(Ints sum, Ints group, Scales s) {
  for (int i = 0; i < kLanes; ++i) sum.v[i] += group.v[i] * s.v[i];
  return sum;
}

#endif

}  // namespace qnext::QNEXT_ISA
