#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "bindings.h"
#include "lane.h"
#include "step.h"

namespace qnext {
namespace {

using Mask = nb::ndarray<const int32_t, nb::device::cpu, nb::c_contig, nb::ndim<1>>;

// Let a chooser know the tokens of an answer, as Python has them; mostly it does already.
void sync(Chooser& chooser, nb::list output) {
  const auto count = static_cast<int64_t>(nb::len(output));
  if (chooser.produced > count) chooser.clear();
  while (chooser.produced < count) {
    chooser.push(nb::cast<int32_t>(output[static_cast<size_t>(chooser.produced)]));
  }
}

// What drafting needs beside the sequences.
struct Drafting {
  DraftHead head;
  Array<const int32_t> ids;  // keeps the memory alive
  RoundSpace space;
};

// For each lane (tokens, drafts of each round as (all, tried, accepted), places of near-ties among
// the tokens, reason, drafts of the next step, whether the MTP layer has read the last round's
// tokens, how many those are, how many of them are not in the state yet); seconds of the forward,
// of choosing and of drafting.
nb::tuple advance(Decoder& decoder, Drafting& drafting, const std::vector<Lane*>& lanes,
                  nb::list outputs, const std::vector<int64_t>& starts,
                  const std::vector<int64_t>& kept, nb::list drafts, nb::object masks,
                  int64_t wanted, Array<float> hidden, nb::object logits, int64_t defined,
                  float tie_bound, float least_share, int64_t rounds, double within) {
  const size_t B = lanes.size();
  if (nb::len(outputs) != B || starts.size() != B || kept.size() != B || nb::len(drafts) != B) {
    throw nb::value_error("advance: expected one entry for each lane.");
  }
  Round round;
  round.turns.resize(B);
  int64_t rows = 0;
  std::vector<Mask> held(B);
  for (size_t b = 0; b < B; ++b) {
    Turn& turn = round.turns[b];
    nb::list output = nb::cast<nb::list>(outputs[b]), guesses = nb::cast<nb::list>(drafts[b]);
    const size_t length = nb::len(output);
    if (!length) throw nb::value_error("advance: a lane has no newest token.");
    turn.lane = lanes[b];
    turn.newest = nb::cast<int32_t>(output[length - 1]);
    turn.start = starts[b];
    turn.kept = kept[b];
    turn.wanted = wanted;
    for (size_t i = 0; i < nb::len(guesses); ++i) {
      turn.drafts.push_back(nb::cast<int32_t>(guesses[i]));
    }
    if (!masks.is_none() && !masks[b].is_none()) {
      if (!turn.drafts.empty() || rounds != 1) {
        throw nb::value_error("advance: a mask is for one round without drafts.");
      }
      held[b] = nb::cast<Mask>(masks[b]);
      turn.allowed = reinterpret_cast<const uint32_t*>(held[b].data());
      turn.allowed_words = static_cast<int64_t>(held[b].size());
    }
    sync(lanes[b]->chooser, output);
    rows += 1 + static_cast<int64_t>(turn.drafts.size());
  }
  // Rounds behind the first may have the drafts that the one before them makes.
  if (rounds > 1) rows = std::max(rows, static_cast<int64_t>(B) * (1 + wanted));
  if (static_cast<int64_t>(hidden.size()) < rows * decoder.shape_.hidden) {
    throw nb::value_error("advance: hidden is too short.");
  }
  round.hidden = hidden.data();
  Array<float> kept_logits;
  if (!logits.is_none()) {
    kept_logits = nb::cast<Array<float>>(logits);
    if (static_cast<int64_t>(kept_logits.size()) < rows * decoder.shape_.vocabulary) {
      throw nb::value_error("advance: logits is too short.");
    }
    round.logits = kept_logits.data();
  }
  round.defined = defined;
  round.tie_bound = tie_bound;
  round.least_share = least_share;
  round.head = drafting.head;
  {
    nb::gil_scoped_release release;
    run_rounds(decoder, round, wanted, {rounds, within}, drafting.space, pool());
  }
  nb::list found;
  for (const Turn& turn : round.turns) {
    nb::list verified;
    for (const Turn::Verified& v : turn.verified) {
      verified.append(nb::make_tuple(v.drafts, v.tried, v.accepted));
    }
    const size_t last = turn.tokens.size() - turn.begin;
    found.append(nb::make_tuple(nb::cast(turn.tokens), verified, nb::cast(turn.close), turn.reason,
                                nb::cast(turn.next), turn.wanted > 0, last,
                                turn.drafts.empty() ? 0 : last));
  }
  return nb::make_tuple(found, round.forward_s, round.choose_s, round.draft_s);
}

// Up to counts[b] drafts of each sequence, after the MTP layer has read the rows of `sequences`.
nb::list propose(Decoder& decoder, Drafting& drafting, const std::vector<Lane*>& lanes,
                 nb::list outputs, Array<const int32_t> ids, Array<const int64_t> sequences,
                 Array<const int64_t> pages, Array<const float> hidden,
                 const std::vector<int64_t>& counts, float least_share) {
  Step step = step_of(ids, sequences, pages);
  const size_t B = step.sequences.size();
  if (lanes.size() != B || nb::len(outputs) != B || counts.size() != B) {
    throw nb::value_error("propose: expected one entry for each sequence.");
  }
  step.hidden_in = hidden.data();
  std::vector<Chooser*> choosers;
  std::vector<std::vector<int32_t>> drafts(B);
  std::vector<std::vector<int32_t>*> into;
  for (size_t b = 0; b < B; ++b) {
    sync(lanes[b]->chooser, nb::cast<nb::list>(outputs[b]));
    choosers.push_back(&lanes[b]->chooser);
    into.push_back(&drafts[b]);
  }
  {
    nb::gil_scoped_release release;
    make_drafts(decoder, step, drafting.head, counts, choosers, least_share, into, drafting.space,
                pool());
  }
  nb::list found;
  for (const auto& tokens : drafts) found.append(nb::cast(tokens));
  return found;
}

}  // namespace

void bind_lane(nb::module_& m) {
  nb::class_<Lane>(m, "Lane")
      .def(
          "__init__",
          [](Lane* self, const Chooser& chooser, int64_t slot, int64_t first, int64_t pending,
             int64_t max_tokens, const std::vector<int64_t>& pages) {
            new (self) Lane{slot, first, pending, max_tokens, pages, chooser};
          },
          nb::arg("chooser"), nb::arg("slot"), nb::arg("first"), nb::arg("pending"),
          nb::arg("max_tokens"), nb::arg("pages"), "A sequence while it runs.")
      .def("set_pages", [](Lane& self, const std::vector<int64_t>& pages) { self.pages = pages; })
      .def(
          "choose_instead",
          [](Lane& self, int32_t token) {
            if (!self.chooser.produced) throw nb::value_error("choose_instead: nothing is chosen.");
            self.chooser.pop();
            self.chooser.push(token);
          },
          nb::arg("token"), "Another token than the last one chosen.");
  nb::class_<Drafting>(m, "Drafting")
      .def(
          "__init__",
          [](Drafting* self, const Matrix& matrix, Array<const int32_t> ids, int64_t limit) {
            if (limit > matrix.rows || static_cast<int64_t>(ids.size()) < limit) {
              throw nb::value_error("Drafting: expected a token for each row, and limit <= rows.");
            }
            new (self) Drafting{{matrix, ids.data(), limit}, ids, {}};
          },
          nb::arg("matrix"), nb::arg("ids"), nb::arg("limit"),
          "The rows of the head that a draft may be, and the token of each.");
  m.def("advance", &advance, nb::arg("decoder"), nb::arg("drafting"), nb::arg("lanes"),
        nb::arg("outputs"), nb::arg("starts"), nb::arg("kept"), nb::arg("drafts"),
        nb::arg("masks").none(), nb::arg("wanted"), nb::arg("hidden"), nb::arg("logits").none(),
        nb::arg("defined"), nb::arg("tie_bound"), nb::arg("least_share"), nb::arg("rounds") = 1,
        nb::arg("within") = 0.0,
        "A step of lanes that decode, with choosing, accepting and drafting; up to `rounds` in a "
        "row, as far as they fit into `within` seconds. masks: None, or for each lane None or "
        "int32 words with a bit for every allowed token; then there are no drafts, and one round.");
  m.def("propose", &propose, nb::arg("decoder"), nb::arg("drafting"), nb::arg("lanes"),
        nb::arg("outputs"), nb::arg("ids"), nb::arg("sequences"), nb::arg("pages"),
        nb::arg("hidden"), nb::arg("counts"), nb::arg("least_share"),
        "Drafts by reading what is new with the MTP layer, and guessing on.");
}

}  // namespace qnext
