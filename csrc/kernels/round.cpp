// The loops run over 16 lanes and are written for the compiler to vectorise: in q4 a lane is a group
// of columns, so nothing is summed across lanes; in q8 a lane is every sixteenth column.
#include "round.h"

#include <math.h>
#include <string.h>

namespace qnext::QNEXT_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int kMaxScale = 15;
constexpr float kSpreads[] = {0.93f, 1.0f, 1.07f};
constexpr float kShares[] = {1.0f, 0.99f, 0.98f, 0.97f, 0.96f};

inline float clamp(float x, float low, float high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

// To nearest, ties to even, for |x| < 2^22.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline float inverse(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

// 16 groups of one row side by side: [column of the group][group].
struct Strip {
  float w[kGroup][kLanes];
  float h[kGroup][kLanes];
  float peak[kLanes];
  float zero_error[kLanes];
};

void load(const float* w, const float* h, int64_t cols, int64_t first, Strip* strip) {
  for (int e = 0; e < kGroup; ++e) {
    for (int l = 0; l < kLanes; ++l) {
      const int64_t c = (first + l) * kGroup + e;
      strip->w[e][l] = c < cols ? w[c] : 0.0f;
      strip->h[e][l] = c < cols ? (h ? h[c] : 1.0f) : 0.0f;
    }
  }
  for (int l = 0; l < kLanes; ++l) strip->peak[l] = strip->zero_error[l] = 0.0f;
  for (int e = 0; e < kGroup; ++e) {
    for (int l = 0; l < kLanes; ++l) {
      const float value = strip->w[e][l];
      const float size = fabsf(value);
      strip->peak[l] = size > strip->peak[l] ? size : strip->peak[l];
      strip->zero_error[l] += (strip->h[e][l] * value) * value;
    }
  }
}

// The best s of each group for a given R; its squared error.
void choose(const Strip& strip, float R, float* s, float* error) {
  float middle[kLanes];
  const float unit = inverse(8.0f * R);
  for (int l = 0; l < kLanes; ++l) {
    middle[l] = nearest(clamp(strip.peak[l] * unit, 0.0f, 100.0f));
    s[l] = 0.0f;
    error[l] = strip.zero_error[l];
  }
  for (int sign = 1; sign >= -1; sign -= 2) {
    for (int offset = -2; offset <= 2; ++offset) {
      float candidate[kLanes], step[kLanes], back[kLanes], sum[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        candidate[l] = clamp(middle[l] + static_cast<float>(offset), 1.0f, kMaxScale) *
                       static_cast<float>(sign);
        step[l] = R * candidate[l];
        back[l] = 1.0f / step[l];
        sum[l] = 0.0f;
      }
      for (int e = 0; e < kGroup; ++e) {
        for (int l = 0; l < kLanes; ++l) {
          const float q = nearest(clamp(strip.w[e][l] * back[l], -8.0f, 7.0f));
          const float difference = strip.w[e][l] - step[l] * q;
          sum[l] += (strip.h[e][l] * difference) * difference;
        }
      }
      for (int l = 0; l < kLanes; ++l) {
        const bool better = sum[l] < error[l];
        s[l] = better ? candidate[l] : s[l];
        error[l] = better ? sum[l] : error[l];
      }
    }
  }
}

void q4_row(const float* w, int64_t cols, const float* h, float* R, int8_t* s, int8_t* q) {
  const int64_t groups = (cols + kGroup - 1) / kGroup;
  float largest = 0.0f;
  for (int64_t c = 0; c < cols; ++c) {
    const float size = fabsf(w[c]);
    largest = size > largest ? size : largest;
  }
  const float base = largest / (8.0f * kMaxScale);
  if (!(base > 0.0f)) {
    *R = 0.0f;
    memset(s, 0, static_cast<size_t>(groups));
    memset(q, 0, static_cast<size_t>(cols));
    return;
  }
  constexpr int kSpreadCount = sizeof(kSpreads) / sizeof(kSpreads[0]);
  double totals[kSpreadCount] = {};
  Strip strip;
  float chosen[kLanes], error[kLanes];
  for (int64_t first = 0; first < groups; first += kLanes) {
    load(w, h, cols, first, &strip);
    for (int i = 0; i < kSpreadCount; ++i) {
      choose(strip, base * kSpreads[i], chosen, error);
      for (int l = 0; l < kLanes; ++l) totals[i] += static_cast<double>(error[l]);
    }
  }
  int best = 0;
  for (int i = 1; i < kSpreadCount; ++i) best = totals[i] < totals[best] ? i : best;
  const float step = base * kSpreads[best];
  double over = 0.0, under = 0.0;
  for (int64_t first = 0; first < groups; first += kLanes) {
    load(w, h, cols, first, &strip);
    choose(strip, step, chosen, error);
    for (int l = 0; l < kLanes && first + l < groups; ++l) {
      s[first + l] = static_cast<int8_t>(chosen[l]);
      const float back = inverse(step * chosen[l]);
      for (int e = 0; e < kGroup; ++e) {
        const int64_t c = (first + l) * kGroup + e;
        if (c >= cols) break;
        const float code = nearest(clamp(strip.w[e][l] * back, -8.0f, 7.0f));
        q[c] = static_cast<int8_t>(code);
        const double x = static_cast<double>(chosen[l] * code);
        over += static_cast<double>(strip.h[e][l]) * x * x;
        under += static_cast<double>(strip.h[e][l]) * x * static_cast<double>(strip.w[e][l]);
      }
    }
  }
  // With the integers fixed, the row's own factor has a closed form.
  *R = over > 0.0 ? static_cast<float>(under / over) : 0.0f;
}

void q4(const float* w, int64_t rows, int64_t cols, const float* importance, float* R, int8_t* s,
        int8_t* q, const Team& team) {
  int64_t first, last;
  team.range(rows, 1, &first, &last);
  const int64_t groups = (cols + kGroup - 1) / kGroup;
  for (int64_t r = first; r < last; ++r) {
    q4_row(w + r * cols, cols, importance, R + r, s + r * groups, q + r * cols);
  }
}

// One range of at most 256 columns, padded with zeros.
void q8_range(const float* w, int count, const float* h, float* d, int8_t* q) {
  float value[kRange], weight[kRange];
  float peaks[kLanes] = {};
  for (int c = 0; c < kRange; ++c) {
    value[c] = c < count ? w[c] : 0.0f;
    weight[c] = c < count ? (h ? h[c] : 1.0f) : 0.0f;
  }
  for (int c = 0; c < kRange; c += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float size = fabsf(value[c + l]);
      peaks[l] = size > peaks[l] ? size : peaks[l];
    }
  }
  float peak = 0.0f;
  for (int l = 0; l < kLanes; ++l) peak = peaks[l] > peak ? peaks[l] : peak;
  float best = 0.0f, best_error = INFINITY;
  for (const float share : kShares) {
    const float step = peak * (share / 127.0f);
    const float back = inverse(step);
    float sums[kLanes] = {};
    for (int c = 0; c < kRange; c += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const float code = nearest(clamp(value[c + l] * back, -127.0f, 127.0f));
        const float difference = value[c + l] - step * code;
        sums[l] += (weight[c + l] * difference) * difference;
      }
    }
    float error = 0.0f;
    for (int l = 0; l < kLanes; ++l) error += sums[l];
    if (error < best_error) {
      best_error = error;
      best = step;
    }
  }
  const float back = inverse(best);
  double over = 0.0, under = 0.0;
  for (int c = 0; c < count; ++c) {
    const float code = nearest(clamp(value[c] * back, -127.0f, 127.0f));
    q[c] = static_cast<int8_t>(code);
    over += static_cast<double>(weight[c]) * static_cast<double>(code) * code;
    under += static_cast<double>(weight[c]) * static_cast<double>(code) * value[c];
  }
  *d = over > 0.0 ? static_cast<float>(under / over) : 0.0f;
}

void q8(const float* w, int64_t rows, int64_t cols, const float* importance, float* d, int8_t* q,
        const Team& team) {
  int64_t first, last;
  team.range(rows, 1, &first, &last);
  const int64_t ranges = (cols + kRange - 1) / kRange;
  for (int64_t r = first; r < last; ++r) {
    for (int64_t b = 0; b < ranges; ++b) {
      const int64_t c = b * kRange;
      const int64_t rest = cols - c;
      q8_range(w + r * cols + c, static_cast<int>(rest < kRange ? rest : kRange),
               importance ? importance + c : nullptr, d + r * ranges + b, q + r * cols + c);
    }
  }
}

}  // namespace

const RoundKernels round_kernels = {q4, q8};

}  // namespace qnext::QNEXT_ISA
