// One work item of a delta layer: everything around the recurrence, and the order of its pieces.
#include "gated_delta.h"

#include "gated_delta_item.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t kLine = 16;  // floats of a cache line: every array of the scratch starts on one

int64_t lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

// Everything an item needs, cut out of the thread's scratch.
struct Scratch {
  DeltaBlock block;
  float* history;     // [J-1][nc], the convolution inputs before the block, rounded
  float* raw;         // [C][nc], the block's own where rounding changes them
  float* weight;      // [J][nc], the taps of the item's channels
  const float** rows;  // [J-1 + C], the inputs in order: history, then the block
  DeltaUpdate* updates;  // [C]
};

// Where the channels of one key head lie: q, k and the values are three sections of the
// checkpoint's order, and stand side by side in a row of qkvz.
struct Section {
  int64_t item;     // first channel inside the item
  int64_t channel;  // first channel of the checkpoint
  int64_t count;
};

struct Item {
  const DeltaLayer& layer;
  const DeltaBatch& batch;
  const DeltaSequence& sequence;
  int64_t head;      // u
  int64_t group;     // r
  int64_t channels;  // nc = 2 K + r M
  Section sections[3];
};

Scratch carve(const DeltaShape& s, void* memory, int64_t* floats) {
  const int64_t group = s.value_heads / s.key_heads, history = s.taps - 1;
  const int64_t nc = 2 * s.key_dim + group * s.value_dim, C = kDeltaBlock;
  float* at = static_cast<float*>(memory);
  int64_t used = 0;
  auto take = [&](int64_t count) {
    float* p = at ? at + used : nullptr;
    used += lines(count);
    return p;
  };
  Scratch x;
  x.block.tokens = 0;
  x.block.key_dim = s.key_dim;
  x.block.value_dim = s.value_dim;
  x.block.group = group;
  x.block.q = take(C * s.key_dim);
  x.block.k = take(C * s.key_dim);
  x.block.qk = take(C);
  x.block.v = take(group * C * s.value_dim);
  x.block.alpha = take(group * C);
  x.block.beta = take(group * C);
  x.block.d = take(group * C * s.value_dim);
  x.block.out = take(group * C * s.value_dim);
  x.block.work = take(delta_step_work(s));
  x.history = take(history * nc);
  x.raw = take(C * nc);
  x.weight = take(s.taps * nc);
  constexpr int64_t kFloats = sizeof(float);
  x.rows = reinterpret_cast<const float**>(
      take((history + C) * static_cast<int64_t>(sizeof(float*)) / kFloats));
  x.updates = reinterpret_cast<DeltaUpdate*>(
      take(C * static_cast<int64_t>(sizeof(DeltaUpdate)) / kFloats));
  *floats = used;
  return x;
}

int64_t scratch_bytes(const DeltaShape& shape) {
  int64_t floats = 0;
  carve(shape, nullptr, &floats);
  return floats * static_cast<int64_t>(sizeof(float));
}

// A row goes by whole vectors, then what is left of it.
struct Whole {};
struct Part {
  int count;
};
inline Vec load(const float* p, Whole) { return Vec::load(p); }
inline Vec load(const float* p, Part part) { return Vec::load(p, part.count); }
inline void store(Vec v, float* p, Whole) { v.store(p); }
inline void store(Vec v, float* p, Part part) { v.store(p, part.count); }

template <class Body>
inline void by_vectors(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) body(i, Whole{});
  if (i < count) body(i, Part{static_cast<int>(count - i)});
}

float dot(const float* a, const float* b, int64_t count) {
  Vec sum = Vec::zero();
  by_vectors(count, [&](int64_t i, auto part) {
    sum = fma(load(a + i, part), load(b + i, part), sum);
  });
  return sum.sum();
}

void scale(float by, int64_t count, float* x) {
  const Vec factor = Vec::set(by);
  by_vectors(count, [&](int64_t i, auto part) { store(load(x + i, part) * factor, x + i, part); });
}

void copy(const float* from, int64_t count, float* to) {
  memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// -- convolution inputs in the window type -----------------------------------------------------

void round_row(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  alignas(64) bf16 narrow[Vec::width];
  for (; i + Vec::width <= count; i += Vec::width) {
    Vec::load(from + i).store(narrow);
    Vec::load(narrow).store(to + i);
  }
  for (; i < count; ++i) to[i] = from_bf16(to_bf16(from[i]));
}

// Row `row` of a tensor [rows][ch] in the window type <-> the item's channels as floats.
void read_row(const Item& item, const void* tensor, int64_t row, float* to) {
  const int64_t first = row * delta_channels(item.layer.shape);
  for (const Section& part : item.sections) {
    const int64_t at = first + part.channel;
    if (item.layer.window_type == WindowType::f32) {
      copy(static_cast<const float*>(tensor) + at, part.count, to + part.item);
    } else {
      const bf16* from = static_cast<const bf16*>(tensor) + at;
      for (int64_t i = 0; i < part.count; ++i) to[part.item + i] = from_bf16(from[i]);
    }
  }
}

void write_row(const Item& item, const float* from, void* tensor, int64_t row) {
  const int64_t first = row * delta_channels(item.layer.shape);
  for (const Section& part : item.sections) {
    const int64_t at = first + part.channel;
    if (item.layer.window_type == WindowType::f32) {
      copy(from + part.item, part.count, static_cast<float*>(tensor) + at);
    } else {
      bf16* to = static_cast<bf16*>(tensor) + at;
      for (int64_t i = 0; i < part.count; ++i) to[i] = to_bf16(from[part.item + i]);
    }
  }
}

void write_window(const Item& item, const Scratch& x, void* window) {
  for (int64_t j = 0; j < item.layer.shape.taps - 1; ++j) {
    write_row(item, x.history + j * item.channels, window, j);
  }
}

// The item's taps side by side: in the checkpoint's order they lie a power of two apart and push
// each other out of L1.
void read_weight(const Item& item, const Scratch& x) {
  const int64_t channels = delta_channels(item.layer.shape);
  for (int64_t j = 0; j < item.layer.shape.taps; ++j) {
    for (const Section& part : item.sections) {
      copy(item.layer.conv_weight + j * channels + part.channel, part.count,
           x.weight + j * item.channels + part.item);
    }
  }
}

// The last J-1 inputs before the new tokens: of the window, then of the kept tokens.
void read_history(const Item& item, const Scratch& x) {
  const int64_t history = item.layer.shape.taps - 1, kept = item.sequence.kept;
  for (int64_t j = 0; j < history; ++j) {
    float* to = x.history + j * item.channels;
    const int64_t row = kept + j;
    if (row < history) {
      read_row(item, item.sequence.window, row, to);
    } else {
      read_row(item, item.sequence.pending_window, row - history, to);
    }
  }
}

// -- a block of tokens --------------------------------------------------------------------------

// Sum over taps and SiLU of `count` channels of one token from channel `first` of the item on;
// window[j] is the input j - (J-1) tokens away. kTaps is J where it is known, else 0. Returns the
// sum of squares of the result.
template <int kTaps>
float convolve(const float* const* window, const float* weight, int64_t channels, int64_t taps,
               int64_t first, int64_t count, float* out) {
  const int64_t J = kTaps ? kTaps : taps;
  Vec squares = Vec::zero();
  by_vectors(count, [&](int64_t i, auto part) {
    Vec sum = Vec::zero();
    for (int64_t j = 0; j < J; ++j) {
      sum = fma(load(window[j] + first + i, part), load(weight + j * channels + first + i, part),
                sum);
    }
    sum = silu(sum);
    squares = fma(sum, sum, squares);
    store(sum, out + i, part);
  });
  return squares.sum();
}

// One token: q and k of unit length, q times K^-0.5 as well, and the values.
template <int kTaps>
void mix(const Scratch& x, int64_t channels, int64_t taps, int64_t t) {
  const DeltaBlock& block = x.block;
  const int64_t K = block.key_dim, M = block.value_dim;
  const float* const* window = x.rows + t;
  float* q = block.q + t * K;
  float* k = block.k + t * K;
  const float q_squares = convolve<kTaps>(window, x.weight, channels, taps, 0, K, q);
  const float k_squares = convolve<kTaps>(window, x.weight, channels, taps, K, K, k);
  scale(1.0f / sqrtf((q_squares + 1e-6f) * static_cast<float>(K)), K, q);
  scale(1.0f / sqrtf(k_squares + 1e-6f), K, k);
  for (int64_t w = 0; w < block.group; ++w) {
    convolve<kTaps>(window, x.weight, channels, taps, 2 * K + w * M, M,
                    block.v + (w * kDeltaBlock + t) * M);
  }
}

// softplus(x) = max(x, 0) + log1p(exp(-|x|)). log1p(e) = 2 atanh(e / (2 + e)), whose series in
// z = (e / (2 + e))^2 <= 1/9 has a relative error below 2e-9 after eight terms.
Vec softplus(Vec x) {
  const Vec e = exp(min(x, Vec::zero() - x));
  const Vec s = e / (Vec::set(2.0f) + e);
  const Vec z = s * s;
  Vec p = Vec::set(1.0f / 15.0f);
  p = fma(p, z, Vec::set(1.0f / 13.0f));
  p = fma(p, z, Vec::set(1.0f / 11.0f));
  p = fma(p, z, Vec::set(1.0f / 9.0f));
  p = fma(p, z, Vec::set(1.0f / 7.0f));
  p = fma(p, z, Vec::set(1.0f / 5.0f));
  p = fma(p, z, Vec::set(1.0f / 3.0f));
  p = fma(p, z, Vec::set(1.0f));
  return max(Vec::zero(), x) + (s + s) * p;
}

// alpha = exp(-exp(A_log) softplus(a + dt_bias)), beta = sigmoid(b), lanes over tokens.
void gates(const Item& item, const DeltaBlock& block, int64_t first_row) {
  const int64_t T = block.tokens;
  for (int64_t w = 0; w < item.group; ++w) {
    const int64_t head = item.head * item.group + w;
    float* alpha = block.alpha + w * kDeltaBlock;
    float* beta = block.beta + w * kDeltaBlock;
    for (int64_t t = 0; t < T; ++t) {
      const float* ba =
          item.batch.ba + (first_row + t) * item.batch.ba_stride + 2 * item.group * item.head;
      beta[t] = ba[w];
      alpha[t] = ba[item.group + w];
    }
    const Vec rate = Vec::set(-expf(item.layer.a_log[head]));
    const Vec bias = Vec::set(item.layer.dt_bias[head]);
    by_vectors(T, [&](int64_t t, auto part) {
      store(exp(rate * softplus(load(alpha + t, part) + bias)), alpha + t, part);
      store(sigmoid(load(beta + t, part)), beta + t, part);
    });
  }
}

// Rows are far apart in qkvz: the processor does not guess where the next one is.
constexpr int64_t kAhead = 3;

// Tokens [done, done + tokens) of the sequence up to the point where the recurrence takes over.
void prepare(const Item& item, Scratch& x, int64_t done, int64_t tokens) {
  const DeltaShape& s = item.layer.shape;
  const int64_t K = s.key_dim, M = s.value_dim, history = s.taps - 1;
  const int64_t first_row = item.sequence.first_row + done;
  const int64_t start = item.head * (2 * K + 2 * item.group * M);
  DeltaBlock& block = x.block;
  block.tokens = tokens;
  for (int64_t j = 0; j < history; ++j) x.rows[j] = x.history + j * item.channels;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = item.batch.qkvz + (first_row + t) * item.batch.qkvz_stride + start;
    if (t + kAhead < tokens) {
      const float* ahead = row + kAhead * item.batch.qkvz_stride;
      for (int64_t i = 0; i < item.channels; i += kLine) __builtin_prefetch(ahead + i);
    }
    if (item.layer.window_type == WindowType::bf16) {
      float* rounded = x.raw + t * item.channels;
      round_row(row, item.channels, rounded);
      row = rounded;
    }
    x.rows[history + t] = row;
    if (s.taps == 4) {
      mix<4>(x, item.channels, s.taps, t);
    } else {
      mix<0>(x, item.channels, s.taps, t);
    }
    block.qk[t] = dot(block.q + t * K, block.k + t * K, K);
  }
  gates(item, block, first_row);
}

// y = o / rms(o) * weight * silu(z) for the block's tokens.
void gated_norm(const Item& item, const DeltaBlock& block, int64_t done) {
  const int64_t K = block.key_dim, M = block.value_dim, group = item.group;
  const int64_t z_start = item.head * (2 * K + 2 * group * M) + 2 * K + group * M;
  const float* weight = item.layer.norm_weight;
  for (int64_t t = 0; t < block.tokens; ++t) {
    const int64_t row = item.sequence.first_row + done + t;
    if (t + kAhead < block.tokens) {
      const float* ahead = item.batch.qkvz + (row + kAhead) * item.batch.qkvz_stride + z_start;
      for (int64_t i = 0; i < group * M; i += kLine) __builtin_prefetch(ahead + i);
    }
    for (int64_t w = 0; w < group; ++w) {
      const float* o = block.out + (w * kDeltaBlock + t) * M;
      const float* z = item.batch.qkvz + row * item.batch.qkvz_stride + z_start + w * M;
      float* y = item.batch.y + (row * item.layer.shape.value_heads + item.head * group + w) * M;
      const float mean = dot(o, o, M) / static_cast<float>(M);
      const Vec factor = Vec::set(1.0f / sqrtf(mean + item.layer.eps));
      by_vectors(M, [&](int64_t i, auto part) {
        const Vec normed = load(o + i, part) * factor * load(weight + i, part);
        store(normed * silu(load(z + i, part)), y + i, part);
      });
    }
  }
}

// -- a whole item -------------------------------------------------------------------------------

// The inputs of the block become history.
void advance(const Item& item, Scratch& x) {
  const int64_t history = item.layer.shape.taps - 1;
  for (int64_t j = 0; j < history; ++j) {
    float* to = x.history + j * item.channels;
    // The source is a later row of the history or a row of the block: not yet written over.
    copy(x.rows[x.block.tokens + j], item.channels, to);
  }
}

// Store what is needed to apply the block's tokens later.
void store_pending(const Item& item, const Scratch& x) {
  const DeltaShape& s = item.layer.shape;
  const DeltaBlock& block = x.block;
  const int64_t K = s.key_dim, M = s.value_dim, group = item.group;
  for (int64_t t = 0; t < block.tokens; ++t) {
    float* token = item.sequence.pending + t * delta_pending_floats(s);
    copy(block.k + t * K, K, token + item.head * K);
    token += s.key_heads * K;
    for (int64_t w = 0; w < group; ++w) {
      const int64_t head = item.head * group + w, at = w * kDeltaBlock + t;
      copy(block.d + at * M, M, token + head * M);
      token[s.value_heads * M + head] = block.alpha[at];
    }
    write_row(item, x.rows[s.taps - 1 + t], item.sequence.pending_window, t);
  }
}

const DeltaUpdate* kept_updates(const Item& item, const Scratch& x, int64_t w) {
  const DeltaShape& s = item.layer.shape;
  const int64_t head = item.head * item.group + w;
  for (int64_t n = 0; n < item.sequence.kept; ++n) {
    const float* token = item.sequence.pending + n * delta_pending_floats(s);
    const float* d = token + s.key_heads * s.key_dim;
    x.updates[n] = {token + item.head * s.key_dim, d + head * s.value_dim,
                    d[s.value_heads * s.value_dim + head]};
  }
  return x.updates;
}

void capture(const Item& item, const Scratch& x, int64_t done) {
  const DeltaShape& s = item.layer.shape;
  const int64_t first = item.head * item.group * s.key_dim * s.value_dim;
  for (int64_t i = 0; i < item.sequence.num_captures; ++i) {
    const DeltaCapture& wish = item.sequence.captures[i];
    if (wish.count != done) continue;
    copy(item.sequence.state + first, item.group * s.key_dim * s.value_dim, wish.state + first);
    write_window(item, x, wish.window);
  }
}

// Where the piece that begins after `done` tokens ends: at a capture or the end of the sequence.
int64_t piece_end(const DeltaSequence& sequence, int64_t done) {
  int64_t end = sequence.tokens;
  for (int64_t i = 0; i < sequence.num_captures; ++i) {
    const int64_t count = sequence.captures[i].count;
    if (count > done && count < end) end = count;
  }
  return end;
}

// `next`: the state that this thread reads after this item's.
void run_item(const Item& item, Scratch& x, const float* next) {
  const DeltaSequence& sequence = item.sequence;
  const DeltaShape& s = item.layer.shape;
  if (sequence.tokens == 0 && sequence.kept == 0) return;
  const int64_t head_size = s.key_dim * s.value_dim;
  float* state = sequence.state + item.head * item.group * head_size;
  int64_t kept = sequence.kept;
  read_history(item, x);
  if (sequence.tokens) read_weight(item, x);
  if (kept && (sequence.speculative || sequence.tokens == 0)) {
    write_window(item, x, sequence.window);
  }
  if (sequence.tokens == 0) {
    x.block.tokens = 0;
    for (int64_t w = 0; w < item.group; ++w) {
      delta_step(x.block, w, state + w * head_size, kept_updates(item, x, w), kept, false,
                 nullptr);
    }
    kept = 0;
  }
  for (int64_t done = 0; done < sequence.tokens;) {
    const int64_t end = piece_end(sequence, done);
    while (done < end) {
      const int64_t tokens = end - done < kDeltaBlock ? end - done : kDeltaBlock;
      prepare(item, x, done, tokens);
      for (int64_t w = 0; w < item.group; ++w) {
        float* one = state + w * head_size;
        const float* follows = w + 1 < item.group               ? one + head_size
                               : done + tokens == sequence.tokens ? next
                                                                  : nullptr;
        const DeltaUpdate* updates = kept ? kept_updates(item, x, w) : nullptr;
        delta_step(x.block, w, one, updates, kept, sequence.speculative, follows);
      }
      gated_norm(item, x.block, done);
      if (sequence.speculative) {
        store_pending(item, x);
      } else {
        advance(item, x);
      }
      kept = 0;
      done += tokens;
    }
    capture(item, x, done);
  }
  if (!sequence.speculative && sequence.tokens) write_window(item, x, sequence.window);
}

void ask(const void* from, int64_t bytes) {
  const char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

void ask_row(const Item& item, const void* tensor, int64_t row) {
  const int64_t size = item.layer.window_type == WindowType::f32 ? 4 : 2;
  const char* at =
      static_cast<const char*>(tensor) + row * delta_channels(item.layer.shape) * size;
  for (const Section& part : item.sections) ask(at + part.channel * size, part.count * size);
}

// Everything short that an item touches, asked for while the item before it runs: each piece alone
// would wait for memory. The state is long and streams by itself.
void ask_ahead(const Item& item) {
  const DeltaShape& s = item.layer.shape;
  const DeltaSequence& sequence = item.sequence;
  const int64_t channels = delta_channels(s);
  constexpr int64_t kFloat = sizeof(float);
  for (int64_t j = 0; j < s.taps; ++j) {
    for (const Section& part : item.sections) {
      ask(item.layer.conv_weight + j * channels + part.channel, part.count * kFloat);
    }
  }
  for (int64_t j = 0; j < s.taps - 1; ++j) ask_row(item, sequence.window, j);
  const int64_t written = sequence.speculative ? sequence.tokens : 0;
  const int64_t pending = sequence.kept > written ? sequence.kept : written;
  for (int64_t n = 0; n < pending; ++n) {
    const float* token = sequence.pending + n * delta_pending_floats(s);
    const float* d = token + s.key_heads * s.key_dim;
    ask(token + item.head * s.key_dim, s.key_dim * kFloat);
    ask(d + item.head * item.group * s.value_dim, item.group * s.value_dim * kFloat);
    ask(d + s.value_heads * s.value_dim + item.head * item.group, item.group * kFloat);
    ask_row(item, sequence.pending_window, n);
  }
}

// Expected cost of an item: reading and writing the state, and the tokens. In a common unit.
int64_t cost(const DeltaSequence& sequence) {
  return sequence.tokens || sequence.kept ? 10 + sequence.tokens : 0;
}

void forward(const DeltaLayer& layer, const DeltaBatch& batch, void* scratch, const Team& team) {
  const DeltaShape& s = layer.shape;
  int64_t floats = 0;
  Scratch x = carve(s, scratch, &floats);
  const int64_t K = s.key_dim, M = s.value_dim, U = s.key_heads, group = s.value_heads / U;
  int64_t per_head = 0;
  for (int64_t b = 0; b < batch.num_sequences; ++b) per_head += cost(batch.sequences[b]);
  const int64_t total = per_head * U;
  const auto item_of = [&](int64_t u, int64_t b) {
    return Item{layer, batch, batch.sequences[b], u, group, 2 * K + group * M,
                {{0, u * K, K},
                 {K, (U + u) * K, K},
                 {2 * K, 2 * U * K + u * group * M, group * M}}};
  };
  // The item before the one at hand: it runs when it is known what comes after it.
  int64_t before = 0, waiting_u = -1, waiting_b = 0;
  const auto run_waiting = [&](const float* next) {
    if (waiting_u >= 0) run_item(item_of(waiting_u, waiting_b), x, next);
  };
  for (int64_t u = 0; u < U; ++u) {
    for (int64_t b = 0; b < batch.num_sequences; ++b) {
      const DeltaSequence& sequence = batch.sequences[b];
      const int64_t own = cost(sequence);
      // An item belongs to the thread in whose share of the cost its middle lies.
      const bool mine = own && (2 * before + own) * team.threads / (2 * total) == team.thread;
      before += own;
      if (!mine) continue;
      if (sequence.tokens) ask_ahead(item_of(u, b));
      run_waiting(sequence.state + u * group * K * M);
      waiting_u = u;
      waiting_b = b;
    }
  }
  run_waiting(nullptr);
}

}  // namespace

const DeltaKernels delta_kernels = {scratch_bytes, forward};

}  // namespace qnext::QNEXT_ISA
