// Routed and shared experts of one layer.
#include <algorithm>
#include <cmath>

#include "decoder.h"
#include "decoder_work.h"

namespace qnext {
namespace {

// From so many rows on a step is a prefill: whole experts are drawn from a counter.
constexpr int64_t kManyRows = 32;
// Rows of one piece of the shared expert when pieces are drawn from the counter.
constexpr int64_t kSharedRows = 256;

// Tiles of gate and up, of a part of one feed-forward.
struct Tiles {
  int64_t first, last;
};

int64_t tiles_of(const FeedForward& ff) { return (ff.width + kTileRows - 1) / kTileRows; }

// This thread's share of them.
Tiles tiles_of(const FeedForward& ff, const Team& team) {
  Tiles own;
  team.range(tiles_of(ff), 1, &own.first, &own.last);
  return own;
}

}  // namespace

// Every row's experts and their weights, and the pairs of both by expert; the shared expert's weight.
void Decoder::route(const Layer& layer, const Step& step, Team& team) {
  Work& w = *work_;
  const int64_t rows = step.rows, D = shape_.hidden, k = shape_.experts_per_token;
  const int64_t experts = layer.router.rows;
  const float* x = w.normed.floats(0);
  if (experts) w.moe->router(x, rows, layer.router, w.router.floats(0), team);
  read_soon(gate_up_at(layer.shared, tiles_of(layer.shared, team).first), team);
  int64_t first, last;
  team.range(rows, 1, &first, &last);
  if (layer.shared_gate.rows) {
    const Team alone;
    float* share = w.shared_weight.floats(0);
    for (int64_t p = first; p < last; ++p) {
      w.moe->router(x + p * D, 1, layer.shared_gate, share + p, alone);
      share[p] = 1.0f / (1.0f + std::exp(-share[p]));
    }
  }
  w.prepare(bits(layer.shared) | layer.expert_inputs, x, rows, D, w.prepared, team);
  if (experts) {
    w.moe->top_k(w.router.floats(0), first, last, experts, k, shape_.rescale_top_k, w.ids.ints(0),
                 w.weights.floats(0));
    if (rows > 1) team.barrier();
  }
  // A single row was routed by the last thread.
  if (team.thread == (rows > 1 ? 0 : team.threads - 1)) {
    if (experts && step.routes) {
      std::copy_n(w.ids.ints(0), rows * k, step.routes + routed_layers_++ * rows * k);
    }
    group_by_expert(experts, rows);
  }
  team.barrier();
}

// Gate and up of all experts in a step of few rows: every expert's tiles are split, so that all
// threads read all the time. `then` is read next.
void Decoder::gate_up_of_few(const Layer& layer, int64_t rows, Team& team, const uint8_t* then) {
  Work& w = *work_;
  const FeedForward& shared = layer.shared;
  const size_t active = w.active.size();
  // Where their weights are; it would be waited for one expert after the other.
  for (const int32_t e : w.active) {
    const auto* at = reinterpret_cast<const char*>(&layer.experts[e]);
    for (size_t i = 0; i < sizeof(FeedForward); i += 64) __builtin_prefetch(at + i, 0, 3);
  }
  const auto expert_at = [&](size_t i) {
    if (i == active) return then;
    const FeedForward& ff = layer.experts[w.active[i]];
    return gate_up_at(ff, tiles_of(ff, team).first);
  };
  const Tiles own = tiles_of(shared, team);
  w.gate_up(shared, rows, nullptr, rows, w.shared_act.floats(0), own.first, own.last, team,
            expert_at(0));
  for (size_t i = 0; i < active; ++i) {
    const int32_t e = w.active[i];
    const FeedForward& ff = layer.experts[e];
    const Tiles tiles = tiles_of(ff, team);
    w.gate_up(ff, rows, w.token.data() + w.start[e], w.start[e + 1] - w.start[e],
              w.act.floats(0) + w.start[e] * ff.width, tiles.first, tiles.last, team,
              expert_at(i + 1));
  }
  read_soon(then, team);
}

// The same in a prefill: whole experts, and pieces of the shared one, go to whoever is free.
void Decoder::gate_up_of_many(const Layer& layer, int64_t rows, Team& team) {
  Work& w = *work_;
  const FeedForward& shared = layer.shared;
  const int64_t pieces = shared.width ? (rows + kSharedRows - 1) / kSharedRows : 0;
  const auto total = pieces + static_cast<int64_t>(w.active.size());
  for (int64_t i = w.counter.next(); i < total; i = w.counter.next()) {
    if (i < pieces) {
      const int64_t begin = i * kSharedRows;
      w.gate_up(shared, rows, w.identity.data() + begin, std::min(rows - begin, kSharedRows),
                w.shared_act.floats(0) + begin * shared.width, 0, tiles_of(shared), team);
      continue;
    }
    const int32_t e = w.active[i - pieces];
    const FeedForward& ff = layer.experts[e];
    w.gate_up(ff, rows, w.token.data() + w.start[e], w.start[e + 1] - w.start[e],
              w.act.floats(0) + w.start[e] * ff.width, 0, tiles_of(ff), team);
  }
}

// h += down of all experts, each by its weight. A thread owns columns of h. `then` is read next.
void Decoder::project_down(const Layer& layer, int64_t rows, Team& team, const uint8_t* then) {
  Work& w = *work_;
  const FeedForward& shared = layer.shared;
  const int64_t D = shape_.hidden;
  const int64_t pairs = layer.router.rows ? rows * shape_.experts_per_token : 0;
  if (pairs) {
    w.prepare(layer.expert_downs, w.act.floats(0), pairs, layer.experts[0].width, w.prepared_act,
              team);
  }
  if (shared.width) {
    w.prepare(bit(shared.down), w.shared_act.floats(0), rows, shared.width, w.prepared_shared,
              team);
  }
  int64_t first, last;
  team.range(D, kTileRows, &first, &last);
  const int64_t wide = last - first;
  float* h = w.h.floats(0);
  for (size_t j = 0; j < w.active.size(); ++j) {
    const int32_t e = w.active[j];
    const uint8_t* follows =
        j + 1 < w.active.size() ? row_at(layer.experts[w.active[j + 1]].down, first)
        : shared.width          ? row_at(shared.down, first)
                                : then;
    const int64_t begin = w.start[e], count = w.start[e + 1] - begin;
    float* out = w.local[team.thread].floats(count * wide);
    w.multiply_part(layer.experts[e].down, w.prepared_act, pairs, w.identity.data() + begin, count,
                    out - first, wide, first, last, team, follows);
    for (int64_t i = 0; i < count; ++i) {
      w.moe->add_scaled(w.pair_weight[begin + i], out + i * wide, wide,
                        h + w.token[begin + i] * D + first);
    }
  }
  if (!shared.width) return;
  const float* share = w.shared_weight.floats(0);
  for (int64_t begin = 0; begin < rows; begin += kSharedRows) {
    const int64_t count = std::min(rows - begin, kSharedRows);
    float* out = w.local[team.thread].floats(count * wide);
    w.multiply_part(shared.down, w.prepared_shared, rows, w.identity.data() + begin, count,
                    out - first, wide, first, last, team, then);
    for (int64_t i = 0; i < count; ++i) {
      w.moe->add_scaled(layer.shared_gate.rows ? share[begin + i] : 1.0f, out + i * wide, wide,
                        h + (begin + i) * D + first);
    }
  }
}

void Decoder::feed_forward(const Layer& layer, const Step& step, Team& team, const Layer* next) {
  Work& w = *work_;
  route(layer, step, team);
  if (step.rows < kManyRows) {
    int64_t first, last;  // columns of h that are this thread's
    team.range(shape_.hidden, kTileRows, &first, &last);
    const FeedForward& begins = w.active.empty() ? layer.shared : layer.experts[w.active[0]];
    gate_up_of_few(layer, step.rows, team, begins.width ? row_at(begins.down, first) : nullptr);
  } else {
    gate_up_of_many(layer, step.rows, team);
  }
  team.barrier();
  const Matrix& last_one = step.head ? *step.head : head;
  const uint8_t* after = next ? share_at(*next, team) : share_at(last_one, kTileRows, team);
  project_down(layer, step.rows, team, after);
  read_soon(after, team);
  team.barrier();
}

// Pairs of token and expert, ordered by expert and then by token.
void Decoder::group_by_expert(int64_t experts, int64_t rows) {
  Work& w = *work_;
  const int64_t k = shape_.experts_per_token;
  w.active.clear();
  w.counter.value = 0;
  if (!experts) return;
  const int32_t* ids = w.ids.ints(0);
  const float* weights = w.weights.floats(0);
  std::fill(w.start.begin(), w.start.end(), 0);
  for (int64_t i = 0; i < rows * k; ++i) ++w.start[ids[i] + 2];
  for (int64_t e = 0; e < experts; ++e) {
    if (w.start[e + 2]) w.active.push_back(static_cast<int32_t>(e));
    w.start[e + 2] += w.start[e + 1];
  }
  experts_read_ += static_cast<int64_t>(w.active.size());
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t x = 0; x < k; ++x) {
      const int64_t at = w.start[ids[p * k + x] + 1]++;
      w.token[at] = static_cast<int32_t>(p);
      w.pair_weight[at] = weights[p * k + x];
    }
  }
}

}  // namespace qnext
