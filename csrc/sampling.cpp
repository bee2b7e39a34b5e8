#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace qnext {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// More than any noise (largest -log(-log(u)), u = 1 - 2^-25, is 17.33).
constexpr float kMostNoise = 17.4f;
// What the rough noise may be wrong by, and the rounding of a sum of score and noise.
constexpr float kRough = 1e-3f;

const SamplingKernels& kernels() { return sampling_kernels(current_isa()); }

int32_t id_of(const Scores& s, int64_t row) {
  return s.ids ? s.ids[row] : static_cast<int32_t>(row);
}

// Row of a token's score, or -1.
int64_t row_of(const Scores& s, int32_t token) {
  if (!s.ids) return token >= 0 && token < s.n ? token : -1;
  const int32_t* found = std::lower_bound(s.ids, s.ids + s.n, token);
  return found != s.ids + s.n && *found == token ? found - s.ids : -1;
}

bool has_bit(const Scores& s, int32_t token) {
  const int64_t word = token / 32;
  return word < s.allowed_words && (s.allowed[word] >> (token % 32) & 1u);
}

uint32_t philox(uint64_t seed, uint32_t index, uint32_t id) {
  uint32_t c0 = id, c1 = index, c2 = 0, c3 = 0;
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

float gumbel_of_bits(uint32_t bits) {
  const double u = (static_cast<double>(bits >> 8) + 0.5) / (1 << 24);
  return static_cast<float>(-std::log(-std::log(u)));
}

// Bias, bans and penalties, on a copy.
const float* adjusted(const Scores& s, const Chooser& c, Bench& bench) {
  bench.scores.assign(s.values, s.values + s.n);
  float* x = bench.scores.data();
  if (s.allowed) {
    if (!s.ids && s.allowed_words * 32 >= s.n) {
      kernels().mask(x, s.n, s.allowed);
    } else {
      for (int64_t r = 0; r < s.n; ++r) {
        if (!has_bit(s, id_of(s, r))) x[r] = kLowest;
      }
    }
  }
  for (const auto& [token, bias] : c.bias) {
    const int64_t r = row_of(s, token);
    if (r >= 0) x[r] += bias;
  }
  // Bans that would leave nothing of what is allowed are lifted.
  std::vector<std::pair<int64_t, float>>& lifted = bench.lifted;
  lifted.clear();
  const auto ban = [&](int32_t token) {
    const int64_t r = row_of(s, token);
    if (r < 0) return;
    lifted.emplace_back(r, x[r]);
    x[r] = kLowest;
  };
  if (c.produced < c.min_tokens) {
    for (const int32_t token : c.stops) ban(token);
  }
  for (const std::vector<int32_t>& word : c.bad_words) {
    const size_t before = word.size() - 1;
    if (before > c.output.size()) continue;
    if (std::equal(word.begin(), word.end() - 1, c.output.end() - before)) ban(word.back());
  }
  if (s.allowed && !lifted.empty() &&
      std::none_of(x, x + s.n, [](float value) { return value > kLowest; })) {
    for (auto one = lifted.rbegin(); one != lifted.rend(); ++one) x[one->first] = one->second;
  }
  if (c.repetition != 1.0f) {
    const auto repeat = [&](int32_t token) {
      const int64_t r = row_of(s, token);
      if (r >= 0) x[r] = x[r] > 0.0f ? x[r] / c.repetition : x[r] * c.repetition;
    };
    for (const int32_t token : c.prompt) repeat(token);
    for (const auto& [token, count] : c.counts) {
      if (!std::binary_search(c.prompt.begin(), c.prompt.end(), token)) repeat(token);
    }
  }
  if (c.presence != 0.0f || c.frequency != 0.0f) {
    for (const auto& [token, count] : c.counts) {
      const int64_t r = row_of(s, token);
      if (r >= 0) x[r] -= c.presence + c.frequency * static_cast<float>(count);
    }
  }
  return x;
}

float find_peaks(const float* x, int64_t n, Bench& bench) {
  bench.peaks.resize((n + kPeak - 1) / kPeak);
  kernels().peaks(x, n, bench.peaks.data());
  return *std::max_element(bench.peaks.begin(), bench.peaks.end());
}

// Rows whose score is at least `least`, in order; from the peaks.
void collect(const float* x, int64_t n, float least, Bench& bench) {
  bench.found.clear();
  for (size_t b = 0; b < bench.peaks.size(); ++b) {
    if (!(bench.peaks[b] >= least)) continue;
    const int64_t first = static_cast<int64_t>(b) * kPeak;
    const int64_t last = first + kPeak < n ? first + kPeak : n;
    for (int64_t r = first; r < last; ++r) {
      if (x[r] >= least) bench.found.push_back(static_cast<int32_t>(r));
    }
  }
}

// The k-th largest score, 0 < k <= n.
float kth_largest(const float* x, int64_t n, int64_t k, Bench& bench) {
  float least = kLowest;
  std::vector<float>& order = bench.order;
  if (k <= static_cast<int64_t>(bench.peaks.size())) {
    // So many peaks are at least that, and so many scores with them.
    order.assign(bench.peaks.begin(), bench.peaks.end());
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<>());
    least = order[k - 1];
  }
  collect(x, n, least, bench);
  if (static_cast<int64_t>(bench.found.size()) < k) return kLowest;  // the rest is no number
  order.clear();
  for (const int32_t r : bench.found) order.push_back(x[r]);
  std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<>());
  return order[k - 1];
}

// The `most` best scores, 0 < most <= n, largest first, of equals the lower row; from the peaks.
// Fewer where the rest is no number.
int64_t rank(const float* x, int64_t n, int64_t most, int32_t* rows, float* values, Bench& bench) {
  collect(x, n, kth_largest(x, n, most, bench), bench);
  std::stable_sort(bench.found.begin(), bench.found.end(),
                   [&](int32_t a, int32_t b) { return x[a] > x[b]; });
  const int64_t count = std::min(most, static_cast<int64_t>(bench.found.size()));
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = bench.found[i];
    values[i] = x[bench.found[i]];
  }
  return count;
}

Choice largest(const float* x, const Scores& s, float top, float tie_bound, Bench& bench) {
  const float slack = tie_bound < 0.0f ? 0.0f : std::max(std::fabs(top), 1.0f) * tie_bound;
  collect(x, s.n, top - slack, bench);
  Choice choice;
  if (bench.found.empty()) return choice;  // no number at all
  int32_t best = -1;
  for (const int32_t r : bench.found) {
    if (best < 0 && x[r] == top) best = r;
  }
  choice.token = id_of(s, best);
  choice.close = tie_bound >= 0.0f && bench.found.size() > 1;
  return choice;
}

// Temperature and noise alone: every token may be chosen.
Choice any_token(const float* x, const Scores& s, const Chooser& c, float top, float slack,
                 bool ties, Bench& bench) {
  const float temperature = c.temperature;
  const auto index = static_cast<uint32_t>(c.produced);
  float best = kLowest, second = kLowest, best_value = kLowest;
  int32_t chosen = id_of(s, 0);
  const auto consider = [&](float value, int32_t id, float noise) {
    const float score = value + noise;
    const bool better = score > best ||
                        (score == best && (value > best_value || (value == best_value && id < chosen)));
    if (better) {
      second = best;
      best = score;
      best_value = value;
      chosen = id;
    } else if (score > second) {
      second = score;
    }
  };
  int32_t ids[kPeak];
  uint32_t bits[kPeak];
  float rough[kPeak];
  const auto look = [&](size_t b) {
    const int64_t first = static_cast<int64_t>(b) * kPeak;
    const int64_t count = std::min(kPeak, s.n - first);
    for (int64_t i = 0; i < count; ++i) ids[i] = id_of(s, first + i);
    kernels().noise(ids, count, c.seed, index, bits, rough);
    for (int64_t i = 0; i < count; ++i) {
      const float value = x[first + i] / temperature;
      if (!(value > kLowest)) continue;
      const float margin = slack + kRough + 1e-5f * std::fabs(value);
      if (value + rough[i] < best - margin) continue;
      consider(value, ids[i], gumbel_of_bits(bits[i]));
    }
  };
  // Where the largest score is comes first: it rules out most others.
  size_t start = 0;
  while (start + 1 < bench.peaks.size() && bench.peaks[start] != top) ++start;
  look(start);
  for (size_t b = 0; b < bench.peaks.size(); ++b) {
    if (b == start || bench.peaks[b] / temperature + kMostNoise < best - slack) continue;
    look(b);
  }
  Choice choice;
  choice.token = chosen;
  choice.close = ties && second >= best - slack;
  return choice;
}

struct Limits {
  int64_t places;
  double top_p, min_p;
  bool rest_counts;  // the mass of what is no candidate belongs to the whole
  double rest;
};

// Which candidates, in order, pass the filters (how many), and which might or do for certain when
// every score may move by half of `slack`: engine/ties.py. False if the last might pass.
bool filter(const Limits& limits, float slack, bool ties, size_t* kept, Bench& bench) {
  const auto& all = bench.candidates;
  const size_t n = all.size();
  std::vector<double>&weight = bench.weight, &before = bench.before;
  weight.resize(n);
  before.resize(n + 1);
  before[0] = 0.0;
  const double first = all[0].value;
  for (size_t i = 0; i < n; ++i) {
    weight[i] = std::exp(static_cast<double>(all[i].value) - first);
    before[i + 1] = before[i] + weight[i];
  }
  const double everything = before[n] + limits.rest;
  size_t keep = n;
  if (limits.places < static_cast<int64_t>(keep)) keep = static_cast<size_t>(limits.places);
  if (limits.min_p > 0.0) {
    while (keep > 1 && weight[keep - 1] < limits.min_p) --keep;
  }
  if (limits.top_p < 1.0) {
    const double whole = limits.rest_counts ? everything : before[keep];
    size_t p = 1;
    while (p < keep && before[p] < limits.top_p * whole) ++p;
    keep = p;
  }
  *kept = keep;
  const bool open = limits.rest_counts && limits.top_p < 1.0;
  if (!ties) return !(open && keep == n);
  bench.may.assign(n, 0);
  bench.must.assign(n, 0);
  const float floor = all[0].value + std::log(static_cast<float>(limits.min_p));
  double most_mass = 0.0, least_mass = 0.0;
  size_t early = 0, late = 0;
  const auto places = static_cast<size_t>(limits.places);
  std::vector<int32_t>& place = bench.place;  // early and late of each
  place.resize(2 * n);
  for (size_t i = 0; i < n; ++i) {
    const float v = all[i].value;
    while (all[early].value > v + slack) ++early;
    if (late < i) late = i;
    while (late + 1 < n && all[late + 1].value >= v - slack) ++late;
    place[2 * i] = static_cast<int32_t>(early);
    place[2 * i + 1] = static_cast<int32_t>(late);
    bench.may[i] = early < places && v >= floor - slack;
    bench.must[i] = late < places && v >= floor + slack;
    if (bench.may[i]) most_mass += weight[i];
    if (bench.must[i]) least_mass += weight[i];
  }
  if (limits.rest_counts) most_mass = least_mass = everything;
  const double up = std::exp(static_cast<double>(slack)), down = std::exp(-static_cast<double>(slack));
  for (size_t i = 0; i < n; ++i) {
    const auto e = static_cast<size_t>(place[2 * i]), l = static_cast<size_t>(place[2 * i + 1]);
    if (limits.top_p < 1.0) {
      const double least = before[e], most = before[l];
      const double lowest = least / (least + std::max(most_mass - least, 0.0) * up);
      const double highest = most / (most + std::max(least_mass - most, 0.0) * down);
      if (!(lowest < limits.top_p) && e != 0) bench.may[i] = 0;
      if (!(highest < limits.top_p)) bench.must[i] = 0;
    }
    if (l == 0) bench.must[i] = 1;
  }
  return !(open && bench.may[n - 1]);
}

Choice filtered(const float* x, const Scores& s, const Chooser& c, float top, float slack,
                bool ties, Bench& bench) {
  const float temperature = c.temperature;
  const float margin = slack * temperature * 1.01f + 1e-6f * std::max(std::fabs(top), 1.0f);
  Limits limits{c.top_k > 0 && c.top_k < s.n ? c.top_k : s.n, c.top_p, c.min_p, true, 0.0};
  // Nothing below can pass. Lowered step by step where only top_p says how far to go.
  float least = kLowest;
  if (limits.places < s.n) least = kth_largest(x, s.n, limits.places, bench) - margin;
  if (c.min_p > 0.0) {
    const float floor = top + temperature * (static_cast<float>(std::log(c.min_p)) - 1e-4f) - margin;
    least = std::max(least, floor);
  }
  limits.rest_counts = least == kLowest;
  double all = 0.0;
  float reach = 8.0f;
  if (limits.rest_counts) all = kernels().sum_exp(x, s.n, top, temperature);
  size_t keep = 0;
  for (;; reach *= 2.0f) {
    const float lowest = limits.rest_counts ? top - reach * temperature : least;
    const bool last = !limits.rest_counts || reach > 200.0f;
    collect(x, s.n, last && limits.rest_counts ? std::numeric_limits<float>::lowest() : lowest,
            bench);
    bench.candidates.clear();
    double mass = 0.0;
    for (const int32_t r : bench.found) {
      if (!(x[r] > kLowest)) continue;
      const float value = x[r] / temperature;
      bench.candidates.push_back({value, id_of(s, r)});
      if (limits.rest_counts) mass += std::exp(static_cast<double>(value) - top / temperature);
    }
    if (bench.candidates.empty()) return Choice{id_of(s, 0), false};
    std::sort(bench.candidates.begin(), bench.candidates.end(),
              [](const Bench::Candidate& a, const Bench::Candidate& b) {
                return a.value > b.value || (a.value == b.value && a.id < b.id);
              });
    limits.rest = last ? 0.0 : std::max(all - mass, 0.0);
    if (filter(limits, slack, ties, &keep, bench) || last) break;
  }
  const auto& some = bench.candidates;
  float best = kLowest, best_sure = kLowest;
  size_t chosen = 0;
  bench.noise.resize(some.size());
  for (size_t i = 0; i < some.size(); ++i) {
    if (i >= keep && !(ties && bench.may[i])) continue;
    const float score = some[i].value + gumbel(c.seed, c.produced, some[i].id);
    bench.noise[i] = score;
    if (i < keep && score > best) {
      best = score;
      chosen = i;
    }
    if (ties && bench.must[i] && score > best_sure) best_sure = score;
  }
  Choice choice;
  choice.token = some[chosen].id;
  for (size_t i = 0; ties && i < some.size() && !choice.close; ++i) {
    choice.close = i != chosen && bench.may[i] && bench.noise[i] >= best_sure - slack;
  }
  return choice;
}

}  // namespace

bool Chooser::adjusts() const {
  return !bias.empty() || !bad_words.empty() || repetition != 1.0f ||
         ((presence != 0.0f || frequency != 0.0f) && !counts.empty()) ||
         (produced < min_tokens && !stops.empty());
}

void Chooser::push(int32_t token) {
  ++produced;
  if (!looks_back()) return;
  ++counts[token];
  output.push_back(token);
}

void Chooser::pop() {
  --produced;
  if (!looks_back()) return;
  const auto found = counts.find(output.back());
  if (--found->second == 0) counts.erase(found);
  output.pop_back();
}

void Chooser::clear() {
  produced = 0;
  counts.clear();
  output.clear();
}

bool Chooser::ends(int32_t token) const {
  return std::find(stops.begin(), stops.end(), token) != stops.end();
}

float gumbel(uint64_t seed, int64_t index, int32_t id) {
  return gumbel_of_bits(philox(seed, static_cast<uint32_t>(index), static_cast<uint32_t>(id)));
}

Choice choose(const Scores& scores, const Chooser& c, float tie_bound, bool want_share,
              Bench& bench) {
  const float* x = scores.values;
  if (scores.allowed || c.adjusts()) x = adjusted(scores, c, bench);
  const float top = find_peaks(x, scores.n, bench);
  const bool ties = tie_bound >= 0.0f;
  Choice choice;
  if (!(top > kLowest)) {
    choice.token = id_of(scores, 0);
  } else if (c.temperature == 0.0f || !std::isfinite(top / c.temperature)) {
    choice = largest(x, scores, top, tie_bound, bench);
  } else {
    const float slack = ties ? std::max(std::fabs(top), 1.0f) * tie_bound / c.temperature : 0.0f;
    const bool narrows = (c.top_k > 0 && c.top_k < scores.n) || c.top_p < 1.0 || c.min_p > 0.0;
    choice = narrows ? filtered(x, scores, c, top, slack, ties, bench)
                     : any_token(x, scores, c, top, slack, ties, bench);
  }
  if (want_share) {
    const int64_t r = row_of(scores, choice.token);
    const double all = kernels().sum_exp(x, scores.n, top, 1.0f);
    choice.share = static_cast<float>(std::exp(static_cast<double>(x[r] - top)) / all);
  }
  return choice;
}

int64_t best_scores(const float* x, int64_t n, int64_t most, int32_t* ids, float* values,
                    Bench& bench) {
  most = std::min(most, n);
  if (most <= 0) return 0;
  find_peaks(x, n, bench);
  return rank(x, n, most, ids, values, bench);
}

float log_probabilities(const float* logits, int64_t n, int32_t token, int64_t most, int32_t* ids,
                        float* values, Bench& bench) {
  const float top = find_peaks(logits, n, bench);
  const double all = static_cast<double>(top) + std::log(kernels().sum_exp(logits, n, top, 1.0f));
  if (most > 0) {
    most = std::min(most, n);
    const int64_t count = rank(logits, n, most, ids, values, bench);
    for (int64_t i = count; i < most; ++i) {
      ids[i] = 0;
      values[i] = logits[0];
    }
    for (int64_t i = 0; i < most; ++i) {
      values[i] = static_cast<float>(static_cast<double>(values[i]) - all);
    }
  }
  return static_cast<float>(static_cast<double>(logits[token]) - all);
}

}  // namespace qnext
