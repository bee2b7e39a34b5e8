// A step of sequences that decode, or a few in a row, in one call from their newest tokens to their
// next ones. A step (a round) is the forward, the choice of a token in every row, the acceptance of
// drafts, and the drafts of the next step. What engine/engine.py does row by row in Python is done
// here for all that needs no more.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder.h"
#include "sampling.h"

namespace qnext {

// A sequence while it runs.
struct Lane {
  int64_t slot = 0;
  int64_t first = 1;         // first position whose keys and values of the MTP layer exist
  int64_t pending = 0;       // where its undecided tokens are
  int64_t max_tokens = 0;    // of its answer
  std::vector<int64_t> pages;
  Chooser chooser;
};

// Where drafts come from: a part of the vocabulary, row r is token ids[r], ascending. A draft need
// not be what the whole vocabulary would give; it only costs if it is wrong.
struct DraftHead {
  Matrix matrix;
  const int32_t* ids = nullptr;
  int64_t limit = 0;  // rows that may be chosen
};

// One lane in a call. In: the newest token is not run yet, `drafts` are guesses behind it.
struct Turn {
  Lane* lane = nullptr;
  int32_t newest = 0;
  int64_t start = 0;  // position of the newest token
  int64_t kept = 0;   // accepted tokens of its last step that are not in its state yet
  int64_t wanted = 0;  // drafts to be made for the next step; 0 leaves the MTP layer alone
  const uint32_t* allowed = nullptr;  // bits of the tokens that may be chosen; null for all
  int64_t allowed_words = 0;
  std::vector<int32_t> drafts;
  size_t begin = 0;  // of `tokens`, where those of this round begin

  // Out. As many tokens were run and stay as were chosen.
  std::vector<int32_t> tokens, next;  // chosen now; drafts behind them
  std::vector<int32_t> close;         // places of the near-ties among the tokens, from 0
  int reason = 0;                     // 1: an end token, 2: max_tokens

  // Drafts of a round: those there were, those put to the test, those that were chosen too.
  struct Verified {
    int64_t drafts = 0, tried = 0, accepted = 0;
  };
  std::vector<Verified> verified;
};

struct Round {
  std::vector<Turn> turns;
  int64_t defined = 0;     // ids below can be chosen
  float tie_bound = -1.0f;  // below 0: near-ties are not counted
  float least_share = 0.0f;  // drafts the MTP head finds less likely are not made
  float* hidden = nullptr;  // [P][D] out
  float* logits = nullptr;  // [P][V] out, or null
  DraftHead head;
  double forward_s = 0.0, choose_s = 0.0, draft_s = 0.0;  // out, added to
};

// Buffers that rounds share.
struct RoundSpace {
  std::vector<float> logits, gathered, hidden;
  std::vector<int32_t> ids, rows;
  std::vector<Bench> benches;
};

// How many rounds may follow each other before anybody looks.
struct Stretch {
  int64_t rounds = 1;
  double within_s = 0.0;  // none begins that would end later, going by the one before it
};

// Rounds that go on from each other, until a turn ends, or has room for fewer drafts than `wanted`.
// Turns gather the tokens of all rounds, as seconds are; drafts, `begin` and hidden rows are the
// last one's.
void run_rounds(Decoder& decoder, Round& round, int64_t wanted, const Stretch& stretch,
                RoundSpace& space, ThreadPool& pool);

// Drafts by reading `step` with the MTP layer and guessing on. `counts` [B] are the most for each
// sequence; `choosers` know the tokens up to the newest, and are left as they were.
void make_drafts(Decoder& decoder, const Step& step, const DraftHead& head,
                 const std::vector<int64_t>& counts, const std::vector<Chooser*>& choosers,
                 float least_share, std::vector<std::vector<int32_t>*> drafts, RoundSpace& space,
                 ThreadPool& pool);

}  // namespace qnext
