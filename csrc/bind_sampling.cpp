#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "sampling.h"

namespace qnext {
namespace {

using Mask = nb::ndarray<const int32_t, nb::device::cpu, nb::c_contig, nb::ndim<1>>;

std::vector<std::pair<int32_t, float>> pairs_of(nb::dict bias) {
  std::vector<std::pair<int32_t, float>> found;
  for (const auto& [token, value] : bias) {
    found.emplace_back(nb::cast<int32_t>(token), nb::cast<float>(value));
  }
  return found;
}

// tokens [R], and for each whether another order of rounding might have chosen another.
nb::tuple choose_rows(Array<const float> logits, const std::vector<const Chooser*>& choosers,
                      nb::object masks, int64_t defined, float tie_bound) {
  const auto R = static_cast<int64_t>(logits.shape(0)), V = static_cast<int64_t>(logits.shape(1));
  if (logits.ndim() != 2 || static_cast<int64_t>(choosers.size()) != R || defined < 1 || defined > V) {
    throw nb::value_error("choose: expected logits [R, V], R choosers and 1 <= defined <= V.");
  }
  std::vector<Mask> held(R);
  std::vector<Scores> scores(R);
  for (int64_t r = 0; r < R; ++r) {
    scores[r].values = logits.data() + r * V;
    scores[r].n = defined;
    if (masks.is_none() || masks[r].is_none()) continue;
    held[r] = nb::cast<Mask>(masks[r]);
    scores[r].allowed = reinterpret_cast<const uint32_t*>(held[r].data());
    scores[r].allowed_words = static_cast<int64_t>(held[r].size());
  }
  std::vector<Choice> found(R);
  {
    nb::gil_scoped_release release;
    pool().run([&](Team& team) {
      Bench bench;
      int64_t first, last;
      team.range(R, 1, &first, &last);
      for (int64_t r = first; r < last; ++r) {
        found[r] = choose(scores[r], *choosers[r], tie_bound, false, bench);
      }
    });
  }
  nb::list tokens, close;
  for (const Choice& one : found) {
    tokens.append(one.token);
    close.append(one.close);
  }
  return nb::make_tuple(tokens, close);
}

// For each row: log-probability of its token, and the best tops[r] as (id, value).
nb::list log_probabilities_of(Array<const float> logits, const std::vector<int32_t>& tokens,
                              const std::vector<int64_t>& tops) {
  const auto R = static_cast<int64_t>(tokens.size());
  if (logits.ndim() != 2 || static_cast<int64_t>(logits.shape(0)) < R ||
      static_cast<int64_t>(tops.size()) != R) {
    throw nb::value_error("log_probabilities: expected logits [R, V], R tokens and R counts.");
  }
  const auto V = static_cast<int64_t>(logits.shape(1));
  std::vector<std::vector<int32_t>> ids(R);
  std::vector<std::vector<float>> values(R);
  std::vector<float> own(R);
  for (int64_t r = 0; r < R; ++r) {
    if (tokens[r] < 0 || tokens[r] >= V) throw nb::value_error("log_probabilities: no such token.");
    ids[r].resize(std::clamp<int64_t>(tops[r], 0, V));
    values[r].resize(ids[r].size());
  }
  {
    nb::gil_scoped_release release;
    pool().run([&](Team& team) {
      Bench bench;
      int64_t first, last;
      team.range(R, 1, &first, &last);
      for (int64_t r = first; r < last; ++r) {
        own[r] = log_probabilities(logits.data() + r * V, V, tokens[r],
                                   static_cast<int64_t>(ids[r].size()), ids[r].data(),
                                   values[r].data(), bench);
      }
    });
  }
  nb::list found;
  for (int64_t r = 0; r < R; ++r) {
    nb::list best;
    for (size_t i = 0; i < ids[r].size(); ++i) best.append(nb::make_tuple(ids[r][i], values[r][i]));
    found.append(nb::make_tuple(own[r], nb::tuple(best)));
  }
  return found;
}

}  // namespace

void bind_sampling(nb::module_& m) {
  nb::class_<Chooser>(m, "Chooser")
      .def(
          "__init__",
          [](Chooser* self, float temperature, int64_t top_k, double top_p, double min_p,
             float repetition, float presence, float frequency, uint64_t seed, int64_t min_tokens,
             nb::dict bias, const std::vector<std::vector<int32_t>>& bad_words,
             const std::vector<int32_t>& stops, std::vector<int32_t> prompt) {
            new (self) Chooser();
            self->temperature = temperature;
            self->top_k = top_k;
            self->top_p = top_p;
            self->min_p = min_p;
            self->repetition = repetition;
            self->presence = presence;
            self->frequency = frequency;
            self->seed = seed;
            self->min_tokens = min_tokens;
            self->bias = pairs_of(bias);
            for (const auto& word : bad_words) {
              if (!word.empty()) self->bad_words.push_back(word);
            }
            self->stops = stops;
            std::sort(prompt.begin(), prompt.end());
            prompt.erase(std::unique(prompt.begin(), prompt.end()), prompt.end());
            self->prompt = std::move(prompt);
          },
          nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
          nb::arg("repetition"), nb::arg("presence"), nb::arg("frequency"), nb::arg("seed"),
          nb::arg("min_tokens"), nb::arg("bias"), nb::arg("bad_words"), nb::arg("stops"),
          nb::arg("prompt"), "How a request chooses; `prompt` matters for `repetition` only.")
      .def_ro("produced", &Chooser::produced)
      .def(
          "set_history",
          [](Chooser& self, int64_t produced, nb::dict counts, std::vector<int32_t> recent) {
            self.clear();
            self.produced = produced;
            for (const auto& [token, count] : counts) {
              const auto times = nb::cast<int64_t>(count);
              if (times > 0) self.counts[nb::cast<int32_t>(token)] = times;
            }
            self.output = std::move(recent);
          },
          nb::arg("produced"), nb::arg("counts"), nb::arg("recent"),
          "Tokens chosen so far: how many, how often each, and the last ones in order.");
  m.def("choose", &choose_rows, nb::arg("logits"), nb::arg("choosers"), nb::arg("masks").none(),
        nb::arg("defined"), nb::arg("tie_bound"),
        "logits [R, V] -> tokens [R], and whether each is a near-tie. masks: None, or for each row "
        "None or int32 words with a bit for every allowed token.");
  m.def("log_probabilities", &log_probabilities_of, nb::arg("logits"), nb::arg("tokens"),
        nb::arg("tops"), "logits [R, V] -> (log-probability of tokens[r], its tops[r] best).");
  m.def(
      "best_scores",
      [](Array<const float> logits, int64_t defined, int64_t most) {
        if (logits.ndim() != 1 || defined < 1 || defined > static_cast<int64_t>(logits.size())) {
          throw nb::value_error("best_scores: expected logits [V] and 1 <= defined <= V.");
        }
        static thread_local Bench bench;
        std::vector<int32_t> ids(std::clamp<int64_t>(most, 0, defined));
        std::vector<float> values(ids.size());
        const int64_t count = best_scores(logits.data(), defined, static_cast<int64_t>(ids.size()),
                                          ids.data(), values.data(), bench);
        ids.resize(count);
        values.resize(count);
        return nb::make_tuple(ids, values);
      },
      nb::arg("logits"), nb::arg("defined"), nb::arg("most"),
      "logits [V] -> ids and values of the best, largest first, of equals the lower id.");
  m.def("gumbel_noise", &gumbel, nb::arg("seed"), nb::arg("index"), nb::arg("id"));
}

}  // namespace qnext
