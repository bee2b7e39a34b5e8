#include "lane.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

namespace qnext {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// What a snapshot of the sequence will need: the hidden row of its last token.
void note_last_hidden(const Cache& cache, int64_t slot, const float* row, int64_t D) {
  uint8_t* out = cache.last_hidden + slot * D * cache.number_bytes;
  if (!cache.is_bf16) {
    std::memcpy(out, row, static_cast<size_t>(D) * 4);
    return;
  }
  auto* wide = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < D; ++i) wide[i] = bf16_of(row[i]);
}

// Tokens of one lane, row by row, as long as they are the drafts.
void choose_tokens(Turn& turn, const Round& round, const float* logits, int64_t vocabulary,
                   Bench& bench) {
  Chooser& chooser = turn.lane->chooser;
  const auto count = static_cast<int64_t>(turn.drafts.size());
  Turn::Verified& verified = turn.verified.emplace_back();
  verified.drafts = count;
  for (int64_t i = 0;; ++i) {
    Scores scores;
    scores.values = logits + i * vocabulary;
    scores.n = round.defined;
    scores.allowed = turn.allowed;
    scores.allowed_words = turn.allowed_words;
    const Choice choice = choose(scores, chooser, round.tie_bound, false, bench);
    chooser.push(choice.token);
    if (choice.close) turn.close.push_back(static_cast<int32_t>(turn.tokens.size()));
    turn.tokens.push_back(choice.token);
    const bool agrees = i < count && turn.drafts[i] == choice.token;
    verified.tried += i < count;
    verified.accepted += agrees;
    if (chooser.ends(choice.token)) {
      turn.reason = 1;
    } else if (chooser.produced >= turn.lane->max_tokens) {
      turn.reason = 2;
    }
    if (turn.reason || !agrees) return;
  }
}

// Make every turn that of the round behind the one that was run: its newest token is the last that
// was chosen. False, and nothing is changed, if one of them ended or lacks room for drafts.
bool go_on(Round& round, int64_t wanted) {
  for (const Turn& turn : round.turns) {
    if (turn.reason || turn.wanted != wanted) return false;
  }
  for (Turn& turn : round.turns) {
    const auto count = static_cast<int64_t>(turn.tokens.size() - turn.begin);
    turn.kept = turn.drafts.empty() ? 0 : count;
    turn.start += count;
    turn.newest = turn.tokens.back();
    turn.begin = turn.tokens.size();
    turn.drafts = std::move(turn.next);
    turn.next.clear();
  }
  return true;
}

// One round. The rows of a turn are packed one behind the other: newest, drafts.
void run_round(Decoder& decoder, Round& round, RoundSpace& space, ThreadPool& pool) {
  const int64_t D = decoder.shape_.hidden, V = decoder.shape_.vocabulary;
  auto start = std::chrono::steady_clock::now();
  Step step;
  space.ids.clear();
  for (const Turn& turn : round.turns) {
    Sequence s;
    s.row = static_cast<int64_t>(space.ids.size());
    s.tokens = 1 + static_cast<int64_t>(turn.drafts.size());
    s.before = turn.start;
    s.slot = turn.lane->slot;
    s.kept = turn.kept;
    s.pending = turn.lane->pending;
    s.speculative = !turn.drafts.empty();
    s.pages = turn.lane->pages.data();
    step.sequences.push_back(s);
    space.ids.push_back(turn.newest);
    space.ids.insert(space.ids.end(), turn.drafts.begin(), turn.drafts.end());
  }
  step.rows = static_cast<int64_t>(space.ids.size());
  step.ids = space.ids.data();
  step.hidden = round.hidden;
  space.rows.resize(space.ids.size());
  std::iota(space.rows.begin(), space.rows.end(), 0);
  step.logit_rows = space.rows.data();
  step.logit_count = step.rows;
  if (!round.logits) space.logits.resize(static_cast<size_t>(step.rows * V));
  step.logits = round.logits ? round.logits : space.logits.data();
  decoder.forward(step, pool);
  round.forward_s += seconds_since(start);

  start = std::chrono::steady_clock::now();
  const auto B = static_cast<int64_t>(round.turns.size());
  if (static_cast<int>(space.benches.size()) < pool.threads()) space.benches.resize(pool.threads());
  pool.run([&](Team& team) {
    int64_t first, last;
    team.range(B, 1, &first, &last);
    for (int64_t b = first; b < last; ++b) {
      const int64_t row = step.sequences[b].row;
      Turn& turn = round.turns[b];
      choose_tokens(turn, round, step.logits + row * V, V, space.benches[team.thread]);
      const auto kept = static_cast<int64_t>(turn.tokens.size() - turn.begin);
      note_last_hidden(decoder.cache, turn.lane->slot, round.hidden + (row + kept - 1) * D, D);
    }
  });
  round.choose_s += seconds_since(start);

  start = std::chrono::steady_clock::now();
  Step reading;
  std::vector<int64_t> counts;
  std::vector<Chooser*> choosers;
  std::vector<std::vector<int32_t>*> drafts;
  std::vector<int32_t> ids;
  bool packed = true;  // the rows to read are the rows of the step
  for (int64_t b = 0; b < B; ++b) {
    Turn& turn = round.turns[b];
    const int64_t room = turn.lane->max_tokens - turn.lane->chooser.produced - 1;
    const int64_t count = turn.reason ? 0 : std::min(turn.wanted, room);
    turn.wanted = count > 0 ? count : 0;
    if (count <= 0) {
      packed = false;
      continue;
    }
    Sequence s = step.sequences[b];
    packed = packed && s.row == static_cast<int64_t>(ids.size());
    s.row = static_cast<int64_t>(ids.size());
    s.tokens = static_cast<int64_t>(turn.tokens.size() - turn.begin);
    s.before = turn.start + 1;
    s.first = turn.lane->first;
    s.kept = 0;
    s.speculative = false;
    reading.sequences.push_back(s);
    ids.insert(ids.end(), turn.tokens.begin() + static_cast<int64_t>(turn.begin),
               turn.tokens.end());
    counts.push_back(count);
    choosers.push_back(&turn.lane->chooser);
    drafts.push_back(&turn.next);
  }
  if (!counts.empty()) {
    reading.ids = ids.data();
    reading.rows = static_cast<int64_t>(ids.size());
    reading.hidden_in = round.hidden;
    if (!packed) {
      space.gathered.resize(ids.size() * D);
      float* out = space.gathered.data();
      for (int64_t b = 0; b < B; ++b) {
        const Turn& turn = round.turns[b];
        if (!turn.wanted) continue;
        const size_t floats = (turn.tokens.size() - turn.begin) * D;
        std::memcpy(out, round.hidden + step.sequences[b].row * D, floats * 4);
        out += floats;
      }
      reading.hidden_in = space.gathered.data();
    }
    make_drafts(decoder, reading, round.head, counts, choosers, round.least_share, drafts, space,
                pool);
  }
  round.draft_s += seconds_since(start);
}

}  // namespace

void run_rounds(Decoder& decoder, Round& round, int64_t wanted, const Stretch& stretch,
                RoundSpace& space, ThreadPool& pool) {
  const auto start = std::chrono::steady_clock::now();
  double before = 0.0;
  for (int64_t done = 1;; ++done) {
    run_round(decoder, round, space, pool);
    const double now = seconds_since(start);
    if (done >= stretch.rounds || now + (now - before) > stretch.within_s) return;
    if (!go_on(round, wanted)) return;
    before = now;
  }
}

void make_drafts(Decoder& decoder, const Step& fill, const DraftHead& head,
                 const std::vector<int64_t>& counts, const std::vector<Chooser*>& choosers,
                 float least_share, std::vector<std::vector<int32_t>*> drafts, RoundSpace& space,
                 ThreadPool& pool) {
  const int64_t D = decoder.shape_.hidden, rows = head.matrix.rows;
  Step step = fill;
  std::vector<int64_t> drafting;
  std::vector<int32_t> ids, last;
  std::vector<float> source;
  for (size_t b = 0; b < counts.size(); ++b) {
    if (!counts[b]) continue;
    const Sequence& s = fill.sequences[b];
    drafting.push_back(static_cast<int64_t>(b));
    last.push_back(static_cast<int32_t>(s.row + s.tokens - 1));
  }
  space.hidden.resize(drafting.size() * D);
  step.hidden = space.hidden.data();
  step.head = &head.matrix;
  step.only_last = true;
  space.logits.resize(std::max(space.logits.size(), drafting.size() * rows));
  step.logits = space.logits.data();
  if (static_cast<int>(space.benches.size()) < pool.threads()) space.benches.resize(pool.threads());
  std::vector<uint8_t> goes_on;
  for (int64_t depth = 0;; ++depth) {
    step.logit_rows = last.data();
    step.logit_count = static_cast<int64_t>(last.size());
    decoder.forward_mtp(step, pool);
    const auto n = static_cast<int64_t>(drafting.size());
    goes_on.assign(static_cast<size_t>(n), 0);
    pool.run([&](Team& team) {
      int64_t first, end;
      team.range(n, 1, &first, &end);
      for (int64_t i = first; i < end; ++i) {
        const int64_t b = drafting[i];
        Scores scores;
        scores.values = step.logits + i * rows;
        scores.n = head.limit;
        scores.ids = head.ids;
        const Choice choice = choose(scores, *choosers[b], -1.0f, least_share > 0.0f,
                                     space.benches[team.thread]);
        if (least_share > 0.0f && choice.share < least_share) continue;
        drafts[b]->push_back(choice.token);
        choosers[b]->push(choice.token);
        goes_on[i] = counts[b] > depth + 1 && !choosers[b]->ends(choice.token);
      }
    });
    std::vector<int64_t> left;
    std::vector<Sequence> sequences;
    source.clear();
    ids.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (!goes_on[i]) continue;
      const int64_t b = drafting[i];
      // A row for the draft itself, behind the last; the next reading writes over it.
      Sequence s = fill.sequences[b];
      s.before += s.tokens + depth;
      s.tokens = 1;
      s.row = static_cast<int64_t>(left.size());
      const float* hidden = step.hidden + i * D;
      source.insert(source.end(), hidden, hidden + D);
      ids.push_back(drafts[b]->back());
      sequences.push_back(s);
      left.push_back(b);
    }
    if (left.empty()) break;
    drafting = left;
    step.sequences = sequences;
    step.ids = ids.data();
    step.rows = static_cast<int64_t>(left.size());
    step.hidden_in = source.data();
    last.resize(left.size());
    std::iota(last.begin(), last.end(), 0);
  }
  for (size_t b = 0; b < counts.size(); ++b) {
    for (size_t i = 0; i < drafts[b]->size(); ++i) choosers[b]->pop();
  }
}

}  // namespace qnext
