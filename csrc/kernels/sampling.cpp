// Plain loops over 16 lanes for the compiler to vectorise, and Vec where exp is needed.
#include "sampling_kernels.h"

#include <math.h>
#include <string.h>

#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int kLanes = 16;

void peaks(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kPeak) {
    float lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = -INFINITY;
    if (i + kPeak <= n) {
      for (int64_t j = i; j < i + kPeak; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) lanes[l] = x[j + l] > lanes[l] ? x[j + l] : lanes[l];
      }
    } else {
      for (int64_t j = i; j < n; ++j) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
    }
    float top = lanes[0];
    for (int l = 1; l < kLanes; ++l) top = lanes[l] > top ? lanes[l] : top;
    out[i / kPeak] = top;
  }
}

double sum_exp(const float* x, int64_t n, float top, float temperature) {
  // exp() of Vec never is 0; what lies far below adds nothing that can be seen.
  const Vec shift = Vec::set(top), over = Vec::set(1.0f / temperature);
  double total = 0.0;
  constexpr int64_t kRun = 1024;
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t last = first + kRun < n ? first + kRun : n;
    Vec sum = Vec::zero();
    int64_t i = first;
    for (; i + Vec::width <= last; i += Vec::width) {
      sum = sum + exp((Vec::load(x + i) - shift) * over);
    }
    total += static_cast<double>(sum.sum());
    for (; i < last; ++i) total += static_cast<double>(expf((x[i] - top) / temperature));
  }
  return total;
}

void mask(float* x, int64_t n, const uint32_t* words) {
  for (int64_t i = 0; i < n; i += 32) {
    const uint32_t word = words[i / 32];
    if (word == 0xffffffffu) continue;
    const int64_t last = i + 32 < n ? i + 32 : n;
    for (int64_t j = i; j < last; ++j) x[j] = (word >> (j - i)) & 1u ? x[j] : -INFINITY;
  }
}

// log of a positive normal number, to 1e-6.
inline float rough_log(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int32_t shifted = static_cast<int32_t>(bits) - 0x3f3504f3;  // sqrt(1/2)
  const int32_t exponent = shifted >> 23;
  const uint32_t rest = static_cast<uint32_t>((shifted & 0x007fffff) + 0x3f3504f3);
  float m;
  memcpy(&m, &rest, 4);
  const float t = (m - 1.0f) / (m + 1.0f), s = t * t;
  const float series = 1.0f + s * (1.0f / 3.0f + s * (1.0f / 5.0f + s * (1.0f / 7.0f)));
  return static_cast<float>(exponent) * 0.693147181f + 2.0f * t * series;
}

void noise(const int32_t* ids, int64_t n, uint64_t seed, uint32_t index, uint32_t* bits,
           float* rough) {
  for (int64_t first = 0; first < n; first += kLanes) {
    const int64_t count = n - first < kLanes ? n - first : kLanes;
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      c0[l] = l < count ? static_cast<uint32_t>(ids[first + l]) : 0u;
      c1[l] = index;
      c2[l] = c3[l] = 0u;
    }
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t p0 = static_cast<uint64_t>(c0[l]) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2[l]) * 0xCD9E8D57u;
        const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c1[l] ^ k0;
        const uint32_t next2 = static_cast<uint32_t>(p0 >> 32) ^ c3[l] ^ k1;
        c1[l] = static_cast<uint32_t>(p1);
        c3[l] = static_cast<uint32_t>(p0);
        c0[l] = next0;
        c2[l] = next2;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    float found[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const auto b = static_cast<int32_t>(c0[l] >> 8);
      // u = (b + 1/2) / 2^24. Near 1 it is 1 - x that has the digits.
      const float u = (static_cast<float>(b) + 0.5f) * 5.9604644775390625e-8f;
      const float x = (static_cast<float>(16777215 - b) + 0.5f) * 5.9604644775390625e-8f;
      const float t = x / (2.0f - x), s = t * t;
      const float near_one =
          2.0f * t * (1.0f + s * (1.0f / 3.0f + s * (1.0f / 5.0f + s * (1.0f / 7.0f))));
      const float small = b >= 8388608 ? near_one : -rough_log(u);
      found[l] = -rough_log(small);
    }
    for (int64_t l = 0; l < count; ++l) {
      bits[first + l] = c0[l];
      rough[first + l] = found[l];
    }
  }
}

}  // namespace

const SamplingKernels sampling_kernels = {peaks, sum_exp, mask, noise};

}  // namespace qnext::QNEXT_ISA
