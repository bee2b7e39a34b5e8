#include "decoder.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "moe.h"
#include "norm.h"

namespace qnext {
namespace {

constexpr int kFormats = 4;
constexpr int64_t kLargePage = 2 << 20;
// From so many rows on a step is a prefill: whole experts are drawn from a counter.
constexpr int64_t kManyRows = 32;
// Rows of one piece of the shared expert when pieces are drawn from the counter.
constexpr int64_t kSharedRows = 256;
// What a waiting thread asks for at most: it stays in the second-level cache until it is read.
constexpr int64_t kSoonBytes = 128 * 1024;

// Memory on 64-byte lines that only grows. Its content is undefined after growing. Large ones ask
// for large pages: looking up small ones takes time.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      const int64_t page = bytes >= kLargePage ? kLargePage : 4096;
      size_ = (bytes + page - 1) / page * page;
      data_ = std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
#if defined(__linux__)
      if (page == kLargePage) madvise(data_, static_cast<size_t>(size_), MADV_HUGEPAGE);
#endif
    }
    return data_;
  }
  float* floats(int64_t count) { return static_cast<float*>(reserve(count * 4)); }
  int32_t* ints(int64_t count) { return static_cast<int32_t*>(reserve(count * 4)); }
  int64_t bytes() const { return size_; }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

unsigned bit(const Matrix& w) { return w.rows ? 1u << static_cast<int>(w.format) : 0u; }

unsigned bits(const FeedForward& f) { return bit(f.gate_up) | bit(f.gate) | bit(f.up); }

// Where row `first` begins; for packed matrices a multiple of 32.
const uint8_t* row_at(const Matrix& w, int64_t first) {
  return static_cast<const uint8_t*>(w.data) + matrix_bytes(w.format, first, w.cols);
}

// A part of a row-major matrix, or whole tiles of a packed one.
Matrix rows_of(const Matrix& w, int64_t first, int64_t count) {
  Matrix part = w;
  part.rows = count;
  part.data = row_at(w, first);
  return part;
}

// What this thread reads next begins there.
void read_soon(const void* at, Team& team) {
  if (at) team.soon = {reinterpret_cast<uintptr_t>(at), reinterpret_cast<uintptr_t>(at) + kSoonBytes};
}

// Its share of the rows of a matrix is what it reads next.
const uint8_t* share_at(const Matrix& w, int64_t grain, const Team& team) {
  if (!w.rows) return nullptr;
  int64_t first, last;
  team.range(w.rows, grain, &first, &last);
  return row_at(w, first);
}

// A layer begins with its projections.
const uint8_t* share_at(const Layer& layer, const Team& team) {
  return share_at(layer.is_attention ? layer.q : layer.qkvz, kTileRows, team);
}

// Where tile `first` of gate and up begins.
const uint8_t* gate_up_at(const FeedForward& ff, int64_t first) {
  if (!ff.width) return nullptr;
  if (ff.gate_up.rows && ff.gate_up.format >= Format::q8) {
    return row_at(ff.gate_up, 2 * first * kTileRows);
  }
  return row_at(ff.gate_up.rows ? ff.gate_up : ff.gate, first * kTileRows);
}

float value_of_bf16(uint16_t x) {
  const uint32_t wide = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

// Columns [first, last) of one row of a matrix in any format, as floats.
void read_row(const Matrix& w, int64_t row, int64_t first, int64_t last, float* out) {
  const auto* bytes = static_cast<const uint8_t*>(w.data);
  if (w.format == Format::f32) {
    std::memcpy(out + first, bytes + (row * w.cols + first) * 4,
                static_cast<size_t>(last - first) * 4);
    return;
  }
  if (w.format == Format::bf16) {
    const auto* in = reinterpret_cast<const uint16_t*>(bytes) + row * w.cols;
    for (int64_t c = first; c < last; ++c) out[c] = value_of_bf16(in[c]);
    return;
  }
  const uint8_t* tile = bytes + matrix_bytes(w.format, row / kTileRows * kTileRows, w.cols);
  const int64_t r = row % kTileRows, line = r / 16 * 64 + r % 16 * 4;
  if (w.format == Format::q8) {
    constexpr int64_t kLinesAhead = 16;  // each 4 columns further on
    for (int64_t c = first; c < last; ++c) {
      const uint8_t* block = tile + c / kBlock * (128 + kBlock * kTileRows);
      const int64_t k = c % kBlock;
      const uint8_t* at = block + 128 + k / 4 * 128 + line;
      if (k % 4 == 0) __builtin_prefetch(at + kLinesAhead * 128, 0, 3);
      float d;
      std::memcpy(&d, block + r * 4, 4);
      out[c] = d * static_cast<float>(at[k % 4] - 128);
    }
    return;
  }
  float scale;
  std::memcpy(&scale, tile + r * 4, 4);
  for (int64_t c = first; c < last; ++c) {
    const uint8_t* piece = tile + 128 + c / 32 * 576;
    const int64_t k = c % 32;
    const uint8_t* pair = piece + 64 + k / 8 * 128 + line;
    if (k % 8 == 0) {
      // Its own lines of the pieces to come: each alone would wait for memory.
      __builtin_prefetch(pair + 4 * 576, 0, 3);
      if (k == 0) __builtin_prefetch(piece + 4 * 576, 0, 3);
    }
    const int s = static_cast<int8_t>(piece[k / 16 * 32 + r]);
    const int q = (k % 8 < 4 ? pair[k % 4] & 15 : pair[k % 4] >> 4) - 8;
    out[c] = scale * static_cast<float>(s * q);
  }
}

// The embeddings of tokens [count][cols], this thread's share of them: blocks, so that one token is
// shared too.
void embed(const Matrix& w, const int32_t* ids, int64_t count, float* out, int64_t ldo,
           const Team& team) {
  const int64_t blocks = (w.cols + kBlock - 1) / kBlock;
  int64_t first, last;
  team.range(count * blocks, 1, &first, &last);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = i % blocks * kBlock;
    const int64_t end = begin + kBlock < w.cols ? begin + kBlock : w.cols;
    read_row(w, ids[i / blocks], begin, end, out + i / blocks * ldo);
  }
}

}  // namespace

void Layer::add_expert(const FeedForward& expert) {
  experts.push_back(expert);
  expert_inputs |= bits(expert);
  expert_downs |= bit(expert.down);
  if (expert.width > expert_width) expert_width = expert.width;
}

// Everything a step needs beside the weights and the cache.
struct Decoder::Work {
  Buffer h, normed, projected, small, keys, values, mixed, cos, sin, pair;
  Buffer gathered, router, ids, weights, act, shared_act, shared_weight;
  Buffer prepared[kFormats], prepared_act[kFormats], prepared_shared[kFormats];
  std::vector<Buffer> scratch, local;
  std::vector<int32_t> start, token, identity, active;
  std::vector<float> pair_weight;
  Counter counter;
  std::vector<DeltaSequence> delta_sequences;
  std::vector<DeltaCapture> delta_captures;
  std::vector<AttentionSequence> attention_sequences;
  Buffer attention_scratch;
  const DeltaKernels* delta = nullptr;
  const AttentionKernels* attention = nullptr;
  const LinearKernels* linear = nullptr;
  const NormKernels* norm = nullptr;
  const MoeKernels* moe = nullptr;

  // Prepare rows for every format in the mask. Barriers before (the rows) and after (the result).
  void prepare(unsigned formats, const float* x, int64_t count, int64_t cols, Buffer* into,
               Team& team) {
    for (int f = 0; f < kFormats; ++f) {
      if (!(formats >> f & 1)) continue;
      const Format format = static_cast<Format>(f);
      linear->prepare(format, x, cols, count, cols, into[f].reserve(0), team);
    }
    team.barrier();
  }

  const void* for_matrix(const Matrix& w, Buffer* from) {
    return from[static_cast<int>(w.format)].reserve(0);
  }

  // out[:, r] for this thread's share of the rows of w.
  void multiply(const Matrix& w, int64_t rows, float* out, int64_t ldo, Team& team,
                const Matrix* then = nullptr) {
    int64_t first, last;
    team.range(w.rows, kTileRows, &first, &last);
    multiply_part(w, prepared, rows, nullptr, rows, out, ldo, first, last, team,
                  then ? share_at(*then, kTileRows, team) : nullptr);
  }

  void multiply_part(const Matrix& w, Buffer* from, int64_t prepared_rows, const int32_t* index,
                     int64_t count, float* out, int64_t ldo, int64_t first, int64_t last,
                     Team& team, const void* next = nullptr) {
    if (first >= last || !count) return;
    void* space = scratch[team.thread].reserve(linear->scratch_bytes(w, count));
    linear->multiply(w, for_matrix(w, from), prepared_rows, index, count, out, ldo, first, last,
                     space, next);
  }

  // act[i][32 * tile ...] = silu(gate x) * (up x) for tiles [first, last) of one feed-forward.
  void gate_up(const FeedForward& ff, int64_t rows, const int32_t* index, int64_t count,
               float* act_out, int64_t first, int64_t last, Team& team,
               const void* next = nullptr) {
    if (first >= last || !count) return;
    const int64_t begin = first * kTileRows;
    const int64_t end = last * kTileRows < ff.width ? last * kTileRows : ff.width;
    if (ff.gate_up.rows && ff.gate_up.format >= Format::q8) {
      // Tiles alternate: 32 rows of gate, the same 32 of up.
      const int64_t wide = 2 * (last - first) * kTileRows;
      float* both = local[team.thread].floats(count * wide);
      multiply_part(ff.gate_up, prepared, rows, index, count, both - first * 2 * kTileRows, wide,
                    first * 2 * kTileRows, last * 2 * kTileRows, team, next);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t f = tile * kTileRows;
        const int64_t width = ff.width - f < kTileRows ? ff.width - f : kTileRows;
        const float* gate = both + (tile - first) * 2 * kTileRows;
        moe->silu_multiply(gate, gate + kTileRows, count, wide, width, act_out + f, ff.width);
      }
      return;
    }
    const int64_t wide = end - begin;
    float* gate = local[team.thread].floats(2 * count * wide);
    float* up = gate + count * wide;
    const Matrix gate_w = ff.gate_up.rows ? rows_of(ff.gate_up, 0, ff.width) : ff.gate;
    const Matrix up_w = ff.gate_up.rows ? rows_of(ff.gate_up, ff.width, ff.width) : ff.up;
    multiply_part(gate_w, prepared, rows, index, count, gate - begin, wide, begin, end, team,
                  row_at(up_w, begin));
    multiply_part(up_w, prepared, rows, index, count, up - begin, wide, begin, end, team, next);
    moe->silu_multiply(gate, up, count, wide, wide, act_out + begin, ff.width);
  }
};

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
  if (step.invariant) batch.step_tokens = INT64_MAX;
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

void Decoder::feed_forward(const Layer& layer, const Step& step, Team& team, const Layer* next) {
  Work& w = *work_;
  const int64_t rows = step.rows, D = shape_.hidden, k = shape_.experts_per_token;
  const int64_t experts = layer.router.rows;
  const FeedForward& shared = layer.shared;
  const float* x = w.normed.floats(0);
  const bool many = rows >= kManyRows;
  const unsigned in = bits(shared) | layer.expert_inputs, down = layer.expert_downs;
  if (experts) w.moe->router(x, rows, layer.router, w.router.floats(0), team);
  const int64_t shared_tiles = (shared.width + kTileRows - 1) / kTileRows;
  int64_t shared_first, shared_last;
  team.range(shared_tiles, 1, &shared_first, &shared_last);
  read_soon(gate_up_at(shared, shared_first), team);
  if (layer.shared_gate.rows) {
    int64_t first, last;
    team.range(rows, 1, &first, &last);
    const Team alone;
    float* share = w.shared_weight.floats(0);
    for (int64_t p = first; p < last; ++p) {
      w.moe->router(x + p * D, 1, layer.shared_gate, share + p, alone);
      share[p] = 1.0f / (1.0f + std::exp(-share[p]));
    }
  }
  w.prepare(in, x, rows, D, w.prepared, team);

  if (experts) {
    int64_t first, last;
    team.range(rows, 1, &first, &last);
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

  // Gate and up of all experts, then down. A step of few rows splits every expert's tiles, so
  // that all threads read all the time; a prefill gives whole experts to whoever is free.
  const int32_t* token = w.token.data();
  float* act = w.act.floats(0);
  float* shared_act = w.shared_act.floats(0);
  int64_t first, last;  // columns of h that are this thread's
  team.range(D, kTileRows, &first, &last);
  const auto down_at = [&, first](const FeedForward& ff) {
    return ff.width ? row_at(ff.down, first) : nullptr;
  };
  if (!many) {
    const auto tiles_of = [&](const FeedForward& ff, int64_t* first, int64_t* last) {
      team.range((ff.width + kTileRows - 1) / kTileRows, 1, first, last);
    };
    const size_t active = w.active.size();
    // Where their weights are; it would be waited for one expert after the other.
    for (const int32_t e : w.active) {
      const auto* at = reinterpret_cast<const char*>(&layer.experts[e]);
      for (size_t i = 0; i < sizeof(FeedForward); i += 64) __builtin_prefetch(at + i, 0, 3);
    }
    const auto expert_at = [&](size_t i) {
      int64_t first, last;
      if (i == active) return active ? down_at(layer.experts[w.active[0]]) : down_at(shared);
      const FeedForward& ff = layer.experts[w.active[i]];
      tiles_of(ff, &first, &last);
      return gate_up_at(ff, first);
    };
    w.gate_up(shared, rows, nullptr, rows, shared_act, shared_first, shared_last, team,
              expert_at(0));
    for (size_t i = 0; i < active; ++i) {
      const int32_t e = w.active[i];
      const FeedForward& ff = layer.experts[e];
      int64_t first, last;
      tiles_of(ff, &first, &last);
      w.gate_up(ff, rows, token + w.start[e], w.start[e + 1] - w.start[e],
                act + w.start[e] * ff.width, first, last, team, expert_at(i + 1));
    }
    read_soon(expert_at(active), team);
  } else {
    const int64_t pieces = shared.width ? (rows + kSharedRows - 1) / kSharedRows : 0;
    const auto total = pieces + static_cast<int64_t>(w.active.size());
    for (int64_t i = w.counter.next(); i < total; i = w.counter.next()) {
      if (i < pieces) {
        const int64_t begin = i * kSharedRows;
        const int64_t count = rows - begin < kSharedRows ? rows - begin : kSharedRows;
        w.gate_up(shared, rows, w.identity.data() + begin, count,
                  shared_act + begin * shared.width, 0, shared_tiles, team);
        continue;
      }
      const int32_t e = w.active[i - pieces];
      const FeedForward& ff = layer.experts[e];
      w.gate_up(ff, rows, token + w.start[e], w.start[e + 1] - w.start[e],
                act + w.start[e] * ff.width, 0, (ff.width + kTileRows - 1) / kTileRows, team);
    }
  }
  team.barrier();
  const int64_t pairs = experts ? rows * k : 0;
  if (pairs) w.prepare(down, act, pairs, layer.experts[0].width, w.prepared_act, team);
  if (shared.width) {
    w.prepare(bit(shared.down), shared_act, rows, shared.width, w.prepared_shared, team);
  }

  const int64_t wide = last - first;
  float* h = w.h.floats(0);
  const Matrix& last_one = step.head ? *step.head : head;
  const uint8_t* after = next ? share_at(*next, team) : share_at(last_one, kTileRows, team);
  for (size_t j = 0; j < w.active.size(); ++j) {
    const int32_t e = w.active[j];
    const uint8_t* follows = j + 1 < w.active.size() ? down_at(layer.experts[w.active[j + 1]])
                             : shared.width          ? down_at(shared)
                                                     : after;
    const int64_t begin = w.start[e], count = w.start[e + 1] - begin;
    float* out = w.local[team.thread].floats(count * wide);
    w.multiply_part(layer.experts[e].down, w.prepared_act, pairs, w.identity.data() + begin, count,
                    out - first, wide, first, last, team, follows);
    for (int64_t i = 0; i < count; ++i) {
      w.moe->add_scaled(w.pair_weight[begin + i], out + i * wide, wide,
                        h + token[begin + i] * D + first);
    }
  }
  if (shared.width) {
    const float* share = w.shared_weight.floats(0);
    for (int64_t begin = 0; begin < rows; begin += kSharedRows) {
      const int64_t count = rows - begin < kSharedRows ? rows - begin : kSharedRows;
      float* out = w.local[team.thread].floats(count * wide);
      w.multiply_part(shared.down, w.prepared_shared, rows, w.identity.data() + begin, count,
                      out - first, wide, first, last, team, after);
      for (int64_t i = 0; i < count; ++i) {
        w.moe->add_scaled(layer.shared_gate.rows ? share[begin + i] : 1.0f, out + i * wide, wide,
                          h + (begin + i) * D + first);
      }
    }
  }
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
