// Choosing tokens from logits: what src/qnext/engine/sampler.py defines, without a tensor.
//
// Order: allowed tokens -> bias -> bans -> penalties -> temperature -> min_p -> top_k -> top_p ->
// noise -> largest; of equal scores the lower id wins. Bans that leave nothing of what is allowed
// are lifted. The noise of a token is a function of (seed,
// number of tokens before it, its id) alone, so a choice does not depend on the batch.
#pragma once

#include <stdint.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "sampling_kernels.h"

namespace qnext {

// How one request chooses, and what it has chosen so far.
struct Chooser {
  float temperature = 1.0f;  // 0 takes the largest
  int64_t top_k = 0;         // 0 or less for all
  double top_p = 1.0, min_p = 0.0;
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  uint64_t seed = 0;
  int64_t min_tokens = 0;
  std::vector<std::pair<int32_t, float>> bias;
  std::vector<std::vector<int32_t>> bad_words;
  std::vector<int32_t> stops;   // banned before min_tokens; they end an answer
  std::vector<int32_t> prompt;  // its distinct tokens, where repetition wants them

  // Tokens chosen so far: how many, how often each, and in order.
  int64_t produced = 0;
  std::unordered_map<int32_t, int64_t> counts;
  std::vector<int32_t> output;

  // Whether anything but temperature, filters and noise has a say.
  bool adjusts() const;
  void push(int32_t token);
  void pop();  // takes back the last push
  void clear();
  bool ends(int32_t token) const;

 private:
  bool looks_back() const {
    return repetition != 1.0f || presence != 0.0f || frequency != 0.0f || !bad_words.empty();
  }
};

// Where the scores come from. ids [n], ascending, names the token of each score; null where score i
// is token i. `allowed` has a bit for each token id (word id / 32, lowest bit first); null for all.
struct Scores {
  const float* values = nullptr;
  int64_t n = 0;
  const int32_t* ids = nullptr;
  const uint32_t* allowed = nullptr;
  int64_t allowed_words = 0;
};

struct Choice {
  int32_t token = 0;
  bool close = false;  // whether another order of rounding might have chosen another token
  float share = 1.0f;  // of the softmax at temperature 1; only where it was asked for
};

// The working memory of one thread.
struct Bench {
  std::vector<float> scores, peaks, noise, order;
  std::vector<int32_t> found, place;
  struct Candidate {
    float value;  // after temperature
    int32_t id;
  };
  std::vector<Candidate> candidates;
  std::vector<double> weight, before;
  std::vector<std::pair<int64_t, float>> lifted;
  std::vector<uint8_t> may, must;
};

// `tie_bound` is how far rounding reaches, relative to the largest score (engine/ties.py); below 0
// nothing is said about closeness.
Choice choose(const Scores& scores, const Chooser& chooser, float tie_bound, bool want_share,
              Bench& bench);

// The best `most` of scores [n], largest first, of equals the lower id; fewer where there are fewer
// numbers. Returns how many.
int64_t best_scores(const float* x, int64_t n, int64_t most, int32_t* ids, float* values,
                    Bench& bench);

// Log-probabilities under unmodified logits [n]: of `token`, and of the best `most` (ids and values,
// largest first, of equals the lower id).
float log_probabilities(const float* logits, int64_t n, int32_t token, int64_t most, int32_t* ids,
                        float* values, Bench& bench);

// Standard Gumbel noise of one token, exactly as sampler.py makes it.
float gumbel(uint64_t seed, int64_t index, int32_t id);

}  // namespace qnext
