// The limits of the machine, with the instructions the products use.
#include "../probe.h"

#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

#if defined(QNEXT_ISA_avx512)

using Word = __m512i;
Word word(const char* p) { return _mm512_load_si512(p); }
Word mixed(Word a, Word b) { return _mm512_xor_si512(a, b); }
int64_t folded(Word a) { return _mm512_reduce_add_epi64(a); }

#elif defined(QNEXT_ISA_avx2) || defined(QNEXT_ISA_avx2vnni)

using Word = __m256i;
Word word(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
Word mixed(Word a, Word b) { return _mm256_xor_si256(a, b); }
int64_t folded(Word a) {
  return _mm256_extract_epi64(a, 0) + _mm256_extract_epi64(a, 1) + _mm256_extract_epi64(a, 2) +
         _mm256_extract_epi64(a, 3);
}

#else

using Word = uint64_t;
Word word(const char* p) {
  Word x;
  memcpy(&x, p, 8);
  return x;
}
Word mixed(Word a, Word b) { return a ^ b; }
int64_t folded(Word a) { return static_cast<int64_t>(a); }

#endif

int64_t read(const void* data, int64_t bytes) {
  constexpr int streams = 8;
  const char* p = static_cast<const char*>(data);
  const int64_t each = bytes / streams / 64 * 64;
  Word mix[streams];
  for (int s = 0; s < streams; ++s) mix[s] = word(p);
  for (int64_t i = 0; i < each; i += 64) {
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) {
#pragma GCC unroll 8
      for (int j = 0; j < 64; j += static_cast<int>(sizeof(Word))) {
        mix[s] = mixed(mix[s], word(p + s * each + i + j));
      }
    }
  }
  int64_t all = 0;
  for (int s = 0; s < streams; ++s) all += folded(mix[s]);
  return all;
}

// Independent sums, enough to hide the latency of an instruction.
constexpr int kSums = 12;

#if defined(QNEXT_ISA_scalar)

int64_t int8(int64_t turns, void* sink) {
  int32_t sums[16] = {};
  int8_t a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = b[i] = static_cast<int8_t>(i);
  for (int64_t turn = 0; turn < turns; ++turn) {
    for (int i = 0; i < 16; ++i) sums[i] += a[i] * b[i];
    __asm__ volatile("" : : "r"(a), "r"(b) : "memory");
  }
  memcpy(sink, sums, sizeof(sums));
  return turns * 16 * 2;
}

int64_t bf16_products(int64_t turns, void* sink) {
  float sums[16] = {}, a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = b[i] = static_cast<float>(i) * 0.01f;
  for (int64_t turn = 0; turn < turns; ++turn) {
    for (int i = 0; i < 16; ++i) sums[i] += a[i] * b[i];
    __asm__ volatile("" : : "r"(a), "r"(b) : "memory");
  }
  memcpy(sink, sums, sizeof(sums));
  return turns * 16 * 2;
}

#else

#if defined(QNEXT_ISA_avx512)
Word product(Word sum, Word a, Word b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#elif defined(QNEXT_ISA_avx2vnni)
Word product(Word sum, Word a, Word b) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}
#else
Word product(Word sum, Word a, Word b) {
  __asm__ volatile("" : "+x"(a));  // or the compiler computes the product once
  return _mm256_add_epi32(
      sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#endif

int64_t int8(int64_t turns, void* sink) {
  alignas(64) char bytes[64];
  memset(bytes, 3, sizeof(bytes));
  const Word a = word(bytes);
  Word sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = a;
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = product(sums[i], a, a);
  }
  Word all = sums[0];
  for (int i = 1; i < kSums; ++i) all = mixed(all, sums[i]);
  memcpy(sink, &all, sizeof(all));
  return turns * kSums * static_cast<int64_t>(sizeof(Word)) * 2;
}

int64_t bf16_products(int64_t turns, void* sink) {
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Vec::zero();
#if defined(QNEXT_ISA_avx512)
  const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3c00));
  constexpr int64_t products = 32;
#else
  const Vec a = Vec::set(0.01f);
  constexpr int64_t products = 8;
#endif
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
#if defined(QNEXT_ISA_avx512)
      sums[i].v = _mm512_dpbf16_ps(sums[i].v, a, a);
#else
      sums[i] = fma(a, a, sums[i]);
#endif
    }
  }
  Vec all = sums[0];
  for (int i = 1; i < kSums; ++i) all = all + sums[i];
  all.store(static_cast<float*>(sink));
  return turns * kSums * products * 2;
}

#endif

}  // namespace

const ProbeKernels probe_kernels = {read, int8, bf16_products};

}  // namespace qnext::QNEXT_ISA
