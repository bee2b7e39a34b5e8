#include "decoder.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "decoder_work.h"
#include "embedding.h"

namespace qnext {

void Layer::add_expert(const FeedForward& expert) {
  experts.push_back(expert);
  expert_inputs |= bits(expert);
  expert_downs |= bit(expert.down);
  if (expert.width > expert_width) expert_width = expert.width;
}

int64_t Decoder::workspace_bytes() const {
  if (!work_) return 0;
  const Work& w = *work_;
  int64_t sum = 0;
  for (const Buffer* b : {&w.h, &w.normed, &w.projected, &w.small, &w.keys, &w.values, &w.mixed,
                          &w.cos, &w.sin, &w.pair, &w.attention_scratch, &w.gathered, &w.router, &w.ids, &w.weights,
                          &w.act, &w.shared_act, &w.shared_weight}) {
    sum += b->bytes();
  }
  for (int f = 0; f < kFormats; ++f) {
    sum += w.prepared[f].bytes() + w.prepared_act[f].bytes() + w.prepared_shared[f].bytes();
  }
  for (const Buffer& b : w.scratch) sum += b.bytes();
  for (const Buffer& b : w.local) sum += b.bytes();
  return sum;
}

// Before the threads start: every shared buffer has its size, so that they only write into them.
void Decoder::reserve(const Step& step, int threads, bool is_mtp) {
  if (!work_) work_ = std::make_shared<Work>();
  experts_read_ = routed_layers_ = 0;
  Work& w = *work_;
  w.linear = &linear_kernels(current_isa());
  w.norm = &norm_kernels(current_isa());
  w.moe = &moe_kernels(current_isa());
  w.delta = &delta_kernels(current_isa());
  w.attention = &attention_kernels(current_isa());
  if (static_cast<int>(w.scratch.size()) != threads) {
    w.scratch = std::vector<Buffer>(threads);
    w.local = std::vector<Buffer>(threads);
  }
  const int64_t rows = step.rows, D = shape_.hidden;
  int64_t projected = 0, small = 0, keys = 0, mixed = 0, experts = 0, act = 0, shared = 0, slots = 0;
  unsigned in = 0, down = 0, shared_down = 0;
  int64_t widest = D;  // columns of anything that is prepared
  const auto most = [](int64_t& a, int64_t b) { a = b > a ? b : a; };
  const auto look = [&](const Layer& layer) {
    if (layer.is_attention) {
      in |= bit(layer.q) | bit(layer.k) | bit(layer.v) | bit(layer.o);
      most(projected, layer.q.rows);
      most(keys, layer.k.rows);
      most(mixed, layer.o.cols);
    } else {
      in |= bit(layer.qkvz) | bit(layer.ba) | bit(layer.out);
      most(projected, layer.qkvz.rows);
      most(small, layer.ba.rows);
      most(mixed, layer.out.cols);
    }
    if (layer.router.rows) {
      most(experts, layer.router.rows);
      slots = shape_.experts_per_token;
      in |= layer.expert_inputs;
      down |= layer.expert_downs;
      most(act, layer.expert_width);
    }
    in |= bits(layer.shared) | bit(layer.shared_gate);
    shared_down |= bit(layer.shared.down);
    most(shared, layer.shared.width);
  };
  if (is_mtp) {
    look(mtp_layer);
    in |= bit(mtp_fc);
    widest = 2 * D;
    w.pair.floats(rows * 2 * D);
  } else {
    for (const Layer& layer : layers) look(layer);
  }
  in |= bit(step.head ? *step.head : head);
  most(widest, mixed);
  w.h.floats(rows * D);
  w.normed.floats(rows * D);
  w.projected.floats(rows * projected);
  w.small.floats(rows * small);
  w.keys.floats(rows * keys);
  w.values.floats(rows * keys);
  w.mixed.floats(rows * mixed);
  w.cos.floats(rows * shape_.rotary);
  w.sin.floats(rows * shape_.rotary);
  w.gathered.floats(step.logit_count * D);
  w.router.floats(rows * experts);
  w.ids.ints(rows * slots);
  w.weights.floats(rows * slots);
  w.act.floats(rows * slots * act);
  w.shared_act.floats(rows * shared);
  w.shared_weight.floats(rows);
  const int64_t prepared_rows = rows > step.logit_count ? rows : step.logit_count;
  for (int f = 0; f < kFormats; ++f) {
    const Format format = static_cast<Format>(f);
    if (in >> f & 1) {
      int64_t bytes = w.linear->prepared_bytes(format, prepared_rows, widest);
      most(bytes, w.linear->prepared_bytes(format, prepared_rows, D));
      w.prepared[f].reserve(bytes);
    }
    if (down >> f & 1) {
      w.prepared_act[f].reserve(w.linear->prepared_bytes(format, rows * slots, act));
    }
    if (shared_down >> f & 1) {
      w.prepared_shared[f].reserve(w.linear->prepared_bytes(format, rows, shared));
    }
  }
  reserve_attention(step, threads);
  w.start.resize(experts + 2);
  w.token.resize(rows * slots);
  w.pair_weight.resize(rows * slots);
  const int64_t most_index = rows * slots > rows ? rows * slots : rows;
  for (int64_t i = static_cast<int64_t>(w.identity.size()); i < most_index; ++i) {
    w.identity.push_back(static_cast<int32_t>(i));
  }
}

void Decoder::reserve_attention(const Step& step, int threads) {
  Work& w = *work_;
  w.attention_sequences.clear();
  for (const Sequence& s : step.sequences) {
    w.attention_sequences.push_back({s.row, s.tokens, s.before, s.first, s.pages});
  }
  w.attention_scratch.reserve(w.attention->scratch_bytes(attention_job(mtp_layer), threads));
}

void Decoder::forward(const Step& step, ThreadPool& pool) {
  reserve(step, pool.threads(), false);
  Work& w = *work_;
  pool.run([&](Team& team) {
    const int64_t D = shape_.hidden;
    float* h = w.h.floats(0);
    embed(embedding, step.ids, step.rows, h, D, team);
    rotary_table(step, team);
    read_soon(share_at(layers[0], team), team);
    team.barrier();
    for (size_t i = 0; i < layers.size(); ++i) {
      run_layer(layers[i], step, team, i + 1 < layers.size() ? &layers[i + 1] : nullptr);
    }
    finish(step, final_norm, team);
  });
}

// The logit rows of a step by themselves: each is the last of its sequence.
Step Decoder::last_rows(const Step& step) const {
  Step last = step;
  last.sequences.clear();
  int64_t number = 0;
  for (const Sequence& s : step.sequences) {
    if (number == step.logit_count || step.logit_rows[number] != s.row + s.tokens - 1) continue;
    Sequence one = s;
    one.before += s.tokens - 1;
    one.tokens = 1;
    one.row = number++;
    last.sequences.push_back(one);
  }
  last.rows = step.logit_count;
  last.logit_rows = work_->identity.data();
  return last;
}

// Keys and values of the rows of h, which is all that later rows want of most of them.
void Decoder::leave_keys(const Layer& layer, int64_t rows, Team& team) {
  Work& w = *work_;
  w.norm->rms_norm(w.h.floats(0), rows, shape_.hidden, layer.input_norm, shape_.eps,
                   w.normed.floats(0), team);
  team.barrier();
  w.prepare(bit(layer.k) | bit(layer.v), w.normed.floats(0), rows, shape_.hidden, w.prepared, team);
  w.multiply(layer.k, rows, w.keys.floats(0), layer.k.rows, team, &layer.v);
  w.multiply(layer.v, rows, w.values.floats(0), layer.v.rows, team);
  team.barrier();
  w.attention->append(attention_job(layer), w.attention_scratch.reserve(0), team);
  team.barrier();
}

// One thread: the rows of `narrow` move to the front.
void Decoder::go_on_with(const Step& wide, const Step& narrow) {
  Work& w = *work_;
  const auto move = [&](Buffer& rows, int64_t width, int64_t from, int64_t to) {
    std::memmove(rows.floats(0) + to * width, rows.floats(0) + from * width,
                 static_cast<size_t>(width) * 4);
  };
  for (int64_t i = 0; i < narrow.rows; ++i) {
    const int64_t row = wide.logit_rows[i];
    move(w.h, shape_.hidden, row, i);
    move(w.cos, shape_.rotary, row, i);
    move(w.sin, shape_.rotary, row, i);
  }
  w.attention_sequences.clear();
  for (const Sequence& s : narrow.sequences) {
    w.attention_sequences.push_back({s.row, s.tokens, s.before, s.first, s.pages});
  }
}

// Row t of the MTP layer embeds token t and reads the main model's hidden row before it.
void Decoder::forward_mtp(const Step& step, ThreadPool& pool) {
  reserve(step, pool.threads(), true);
  Work& w = *work_;
  const bool narrows = step.only_last && step.rows > step.logit_count;
  Step narrow;
  if (narrows) {
    narrow = last_rows(step);
    reserve_attention(narrow, pool.threads());
    reserve_attention(step, pool.threads());
  }
  pool.run([&](Team& team) {
    const int64_t D = shape_.hidden;
    float* normed = w.normed.floats(0);
    float* pair = w.pair.floats(0);
    int64_t first, last;
    team.range(step.rows, 1, &first, &last);
    const Team alone;
    for (int64_t p = first; p < last; ++p) {
      read_row(embedding, step.ids[p], 0, D, normed + p * D);
      w.norm->rms_norm(normed + p * D, 1, D, mtp_embedding_norm, shape_.eps, pair + p * 2 * D,
                       alone);
      w.norm->rms_norm(step.hidden_in + p * D, 1, D, mtp_hidden_norm, shape_.eps,
                       pair + p * 2 * D + D, alone);
    }
    rotary_table(step, team);
    team.barrier();
    w.prepare(bit(mtp_fc), pair, step.rows, 2 * D, w.prepared, team);
    w.multiply(mtp_fc, step.rows, w.h.floats(0), D, team);
    team.barrier();
    if (narrows) {
      leave_keys(mtp_layer, step.rows, team);
      if (team.thread == 0) go_on_with(step, narrow);
      team.barrier();
    }
    const Step& rest = narrows ? narrow : step;
    if (!rest.rows) return;
    run_layer(mtp_layer, rest, team, nullptr);
    finish(rest, mtp_norm, team);
  });
}

void Decoder::rotary_table(const Step& step, Team& team) {
  const int64_t Y = shape_.rotary, half = Y / 2;
  if (!Y) return;
  Work& w = *work_;
  float *cosines = w.cos.floats(0), *sines = w.sin.floats(0);
  int64_t first, last;
  team.range(step.rows, 1, &first, &last);
  for (const Sequence& s : step.sequences) {
    for (int64_t t = 0; t < s.tokens; ++t) {
      const int64_t p = s.row + t;
      if (p < first || p >= last) continue;
      const auto position = static_cast<float>(s.before + t);
      for (int64_t i = 0; i < half; ++i) {
        const float angle = position * frequencies[i];
        cosines[p * Y + i] = cosines[p * Y + half + i] = std::cos(angle) * shape_.rope_multiplier;
        sines[p * Y + i] = sines[p * Y + half + i] = std::sin(angle) * shape_.rope_multiplier;
      }
    }
  }
}

void Decoder::run_layer(const Layer& layer, const Step& step, Team& team, const Layer* next) {
  Work& w = *work_;
  const int64_t rows = step.rows, D = shape_.hidden;
  w.norm->rms_norm(w.h.floats(0), rows, D, layer.input_norm, shape_.eps, w.normed.floats(0), team);
  team.barrier();
  if (layer.is_attention) {
    attention(layer, step, team);
  } else {
    delta(layer, step, team);
  }
  w.norm->rms_norm(w.h.floats(0), rows, D, layer.post_norm, shape_.eps, w.normed.floats(0), team);
  team.barrier();
  feed_forward(layer, step, team, next);
}

// h += W mixed. A thread owns columns of h, so nothing is added twice or in another order.
void Decoder::project_back(const Layer& layer, int64_t rows, Team& team) {
  Work& work = *work_;
  const Matrix& w = layer.is_attention ? layer.o : layer.out;
  const int64_t D = shape_.hidden;
  work.prepare(bit(w), work.mixed.floats(0), rows, w.cols, work.prepared, team);
  int64_t first, last;
  team.range(w.rows, kTileRows, &first, &last);
  if (first < last) {
    const int64_t wide = last - first;
    float* out = work.local[team.thread].floats(rows * wide);
    work.multiply_part(w, work.prepared, rows, nullptr, rows, out - first, wide, first, last, team);
    for (int64_t p = 0; p < rows; ++p) {
      work.moe->add_scaled(1.0f, out + p * wide, wide, work.h.floats(0) + p * D + first);
    }
  }
  read_soon(share_at(layer.router, 4, team), team);
  team.barrier();
}

AttentionJob Decoder::attention_job(const Layer& layer) const {
  Work& w = *work_;
  AttentionJob job;
  job.heads = shape_.query_heads;
  job.kv_heads = shape_.kv_heads;
  job.head_size = shape_.head_dim;
  job.rotary = shape_.rotary;
  job.gated = shape_.gated_attention;
  job.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  job.eps = shape_.eps;
  job.q_norm = layer.q_norm;
  job.k_norm = layer.k_norm;
  job.cos = w.cos.floats(0);
  job.sin = w.sin.floats(0);
  job.q = w.projected.floats(0);
  job.k = w.keys.floats(0);
  job.v = w.values.floats(0);
  job.out = w.mixed.floats(0);
  job.cache = cache.pages;
  job.type = cache.is_bf16 ? CacheType::bf16 : CacheType::f32;
  job.layers = cache.page_layers;
  job.layer = layer.pages_layer;
  job.page_size = cache.page_size;
  job.sequences = w.attention_sequences.data();
  job.count = static_cast<int64_t>(w.attention_sequences.size());
  return job;
}

void Decoder::attention(const Layer& layer, const Step& step, Team& team) {
  Work& w = *work_;
  const int64_t rows = step.rows;
  w.prepare(bit(layer.q) | bit(layer.k) | bit(layer.v), w.normed.floats(0), rows, shape_.hidden,
            w.prepared, team);
  w.multiply(layer.q, rows, w.projected.floats(0), layer.q.rows, team, &layer.k);
  w.multiply(layer.k, rows, w.keys.floats(0), layer.k.rows, team, &layer.v);
  w.multiply(layer.v, rows, w.values.floats(0), layer.v.rows, team);
  team.barrier();
  const AttentionJob job = attention_job(layer);
  void* scratch = w.attention_scratch.reserve(0);
  w.attention->append(job, scratch, team);
  team.barrier();
  w.attention->attend(job, scratch, team);
  read_soon(share_at(layer.o, kTileRows, team), team);
  team.barrier();
  project_back(layer, rows, team);
}

DeltaLayer Decoder::delta_layer(const Layer& layer) const {
  DeltaLayer d;
  d.shape = {shape_.key_heads, shape_.value_heads, shape_.key_dim, shape_.value_dim, shape_.taps};
  d.window_type = cache.is_bf16 ? WindowType::bf16 : WindowType::f32;
  d.conv_weight = layer.conv;
  d.a_log = layer.a_log;
  d.dt_bias = layer.dt_bias;
  d.norm_weight = layer.gated_norm;
  d.eps = shape_.eps;
  return d;
}

DeltaSequence Decoder::delta_sequence(const Layer& layer, int64_t slot, int64_t pending) const {
  const DeltaShape shape = delta_layer(layer).shape;
  const int64_t at = layer.state_layer * cache.slots + slot;
  const int64_t channels = delta_channels(shape);
  DeltaSequence s;
  s.state = cache.recurrent + at * shape.value_heads * shape.key_dim * shape.value_dim;
  s.window = cache.conv + at * (shape.taps - 1) * channels * cache.number_bytes;
  const int64_t row = (layer.state_layer * cache.num_pending + pending) * cache.most_pending;
  s.pending = cache.pending + row * delta_pending_floats(shape);
  s.pending_window = cache.pending_window + row * channels * cache.number_bytes;
  return s;
}

// One thread; the others wait at the barrier after the projections.
void Decoder::fill_delta_sequences(const Layer& layer, const Step& step) {
  Work& w = *work_;
  w.delta_sequences.clear();
  w.delta_captures.clear();
  w.delta_captures.reserve(step.captures.size());  // pointers into it must stay
  for (size_t b = 0; b < step.sequences.size(); ++b) {
    const Sequence& s = step.sequences[b];
    DeltaSequence d = delta_sequence(layer, s.slot, s.pending);
    d.kept = s.kept;
    d.first_row = s.row;
    d.tokens = s.tokens;
    d.speculative = s.speculative;
    d.captures = w.delta_captures.data() + w.delta_captures.size();
    for (const Capture& c : step.captures) {
      if (c.sequence != static_cast<int64_t>(b)) continue;
      const DeltaSequence target = delta_sequence(layer, c.slot, 0);
      w.delta_captures.push_back({c.count, target.state, target.window});
      ++d.num_captures;
    }
    w.delta_sequences.push_back(d);
  }
}

void Decoder::delta(const Layer& layer, const Step& step, Team& team) {
  Work& w = *work_;
  const int64_t rows = step.rows;
  w.prepare(bit(layer.qkvz) | bit(layer.ba), w.normed.floats(0), rows, shape_.hidden, w.prepared,
            team);
  if (team.thread == 0) fill_delta_sequences(layer, step);
  w.multiply(layer.qkvz, rows, w.projected.floats(0), layer.qkvz.rows, team, &layer.ba);
  w.multiply(layer.ba, rows, w.small.floats(0), layer.ba.rows, team);
  if (!step.sequences.empty()) {
    const int64_t head = shape_.key_heads * team.thread / team.threads;
    const int64_t group = shape_.value_heads / shape_.key_heads;
    const DeltaSequence s = delta_sequence(layer, step.sequences[0].slot, 0);
    read_soon(s.state + head * group * shape_.key_dim * shape_.value_dim, team);
  }
  team.barrier();
  const DeltaLayer delta = delta_layer(layer);
  DeltaBatch batch;
  batch.qkvz = w.projected.floats(0);
  batch.qkvz_stride = layer.qkvz.rows;
  batch.ba = w.small.floats(0);
  batch.ba_stride = layer.ba.rows;
  batch.y = w.mixed.floats(0);
  batch.sequences = w.delta_sequences.data();
  batch.num_sequences = static_cast<int64_t>(w.delta_sequences.size());
  void* scratch = w.scratch[team.thread].reserve(w.delta->scratch_bytes(delta.shape));
  w.delta->forward(delta, batch, scratch, team);
  read_soon(share_at(layer.out, kTileRows, team), team);
  team.barrier();
  project_back(layer, rows, team);
}

void Decoder::settle(int64_t slot, int64_t pending, int64_t kept, ThreadPool& pool) {
  const DeltaKernels& kernels = delta_kernels(current_isa());
  std::vector<Buffer> scratch(pool.threads());
  pool.run([&](Team& team) {
    for (const Layer& layer : layers) {
      if (layer.is_attention) continue;
      const DeltaLayer delta = delta_layer(layer);
      DeltaSequence sequence = delta_sequence(layer, slot, pending);
      sequence.kept = kept;
      DeltaBatch batch;
      batch.sequences = &sequence;
      batch.num_sequences = 1;
      void* space = scratch[team.thread].reserve(kernels.scratch_bytes(delta.shape));
      kernels.forward(delta, batch, space, team);
    }
  });
}

void Decoder::finish(const Step& step, const float* norm, Team& team) {
  Work& w = *work_;
  const int64_t D = shape_.hidden;
  w.norm->rms_norm(w.h.floats(0), step.rows, D, norm, shape_.eps, step.hidden, team);
  team.barrier();
  if (!step.logit_count) return;
  float* rows = w.gathered.floats(0);
  int64_t first, last;
  team.range(step.logit_count, 1, &first, &last);
  for (int64_t i = first; i < last; ++i) {
    std::memcpy(rows + i * D, step.hidden + step.logit_rows[i] * D, static_cast<size_t>(D) * 4);
  }
  team.barrier();
  const Matrix& out = step.head ? *step.head : head;
  w.prepare(bit(out), rows, step.logit_count, D, w.prepared, team);
  w.multiply(out, step.logit_count, step.logits, out.rows, team);
}

}  // namespace qnext
