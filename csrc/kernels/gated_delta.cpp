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
  float* mixed;       // [nc], one token after convolution and SiLU
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
  const int64_t nc = 2 * s.key_dim + group * s.value_dim, C = kDeltaChunk;
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
  x.block.g = take(group * C);
  x.block.alpha = take(group * C);
  x.block.beta = take(group * C);
  x.block.d = take(group * C * s.value_dim);
  x.block.out = take(group * C * s.value_dim);
  const int64_t step = delta_step_work(s), chunk = delta_chunk_work(s);
  x.block.work = take(step > chunk ? step : chunk);
  x.history = take(history * nc);
  x.raw = take(C * nc);
  x.mixed = take(nc);
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

// The rest of a row of n floats, or a whole vector of it.
inline Vec load_some(const float* p, int64_t left) {
  return left >= Vec::width ? Vec::load(p) : Vec::load(p, static_cast<int>(left));
}
inline void store_some(Vec v, float* p, int64_t left) {
  if (left >= Vec::width) {
    v.store(p);
  } else {
    v.store(p, static_cast<int>(left));
  }
}

float dot(const float* a, const float* b, int64_t count) {
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < count; i += Vec::width) {
    sum = fma(load_some(a + i, count - i), load_some(b + i, count - i), sum);
  }
  return sum.sum();
}

void scale(const float* x, float by, int64_t count, float* out) {
  const Vec factor = Vec::set(by);
  for (int64_t i = 0; i < count; i += Vec::width) {
    store_some(load_some(x + i, count - i) * factor, out + i, count - i);
  }
}

void copy(const float* from, int64_t count, float* to) {
  memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// -- convolution inputs in the window type ---------------------------------------------------------

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

// -- a block of tokens -------------------------------------------------------------------------------

// Sum over taps and SiLU for one token: window[j] is the input j - (J-1) tokens away.
void convolve(const Item& item, const float* const* window, float* out) {
  const DeltaShape& s = item.layer.shape;
  const int64_t channels = delta_channels(s);
  for (const Section& part : item.sections) {
    const float* weight = item.layer.conv_weight + part.channel;
    for (int64_t i = 0; i < part.count; i += Vec::width) {
      const int64_t left = part.count - i;
      Vec sum = Vec::zero();
      for (int64_t j = 0; j < s.taps; ++j) {
        sum = fma(load_some(window[j] + part.item + i, left),
                  load_some(weight + j * channels + i, left), sum);
      }
      store_some(silu(sum), out + part.item + i, left);
    }
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

// g = -exp(A_log) softplus(a + dt_bias), alpha = exp(g), beta = sigmoid(b), lanes over tokens.
void gates(const Item& item, const DeltaBlock& block, int64_t first_row) {
  const int64_t T = block.tokens;
  for (int64_t w = 0; w < item.group; ++w) {
    const int64_t head = item.head * item.group + w;
    float* g = block.g + w * kDeltaChunk;
    float* alpha = block.alpha + w * kDeltaChunk;
    float* beta = block.beta + w * kDeltaChunk;
    for (int64_t t = 0; t < T; ++t) {
      const float* ba =
          item.batch.ba + (first_row + t) * item.batch.ba_stride + 2 * item.group * item.head;
      beta[t] = ba[w];
      g[t] = ba[item.group + w];
    }
    const Vec rate = Vec::set(-expf(item.layer.a_log[head]));
    const Vec bias = Vec::set(item.layer.dt_bias[head]);
    for (int64_t t = 0; t < T; t += Vec::width) {
      const Vec decay = rate * softplus(load_some(g + t, T - t) + bias);
      store_some(decay, g + t, T - t);
      store_some(exp(decay), alpha + t, T - t);
      store_some(sigmoid(load_some(beta + t, T - t)), beta + t, T - t);
    }
  }
}

// Tokens [done, done + tokens) of the sequence up to the point where the recurrence takes over.
void prepare(const Item& item, Scratch& x, int64_t done, int64_t tokens) {
  const DeltaShape& s = item.layer.shape;
  const int64_t K = s.key_dim, M = s.value_dim, history = s.taps - 1;
  const int64_t first_row = item.sequence.first_row + done;
  const int64_t start = item.head * (2 * K + 2 * item.group * M);
  DeltaBlock& block = x.block;
  block.tokens = tokens;
  for (int64_t j = 0; j < history; ++j) x.rows[j] = x.history + j * item.channels;
  const float key_scale = 1.0f / sqrtf(static_cast<float>(K));
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = item.batch.qkvz + (first_row + t) * item.batch.qkvz_stride + start;
    if (item.layer.window_type == WindowType::bf16) {
      float* rounded = x.raw + t * item.channels;
      round_row(row, item.channels, rounded);
      row = rounded;
    }
    x.rows[history + t] = row;
    convolve(item, x.rows + t, x.mixed);
    const float* q = x.mixed;
    const float* k = x.mixed + K;
    float* q_out = block.q + t * K;
    float* k_out = block.k + t * K;
    scale(q, key_scale / sqrtf(dot(q, q, K) + 1e-6f), K, q_out);
    scale(k, 1.0f / sqrtf(dot(k, k, K) + 1e-6f), K, k_out);
    block.qk[t] = dot(q_out, k_out, K);
    for (int64_t w = 0; w < item.group; ++w) {
      copy(x.mixed + 2 * K + w * M, M, block.v + (w * kDeltaChunk + t) * M);
    }
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
    for (int64_t w = 0; w < group; ++w) {
      const float* o = block.out + (w * kDeltaChunk + t) * M;
      const float* z = item.batch.qkvz + row * item.batch.qkvz_stride + z_start + w * M;
      float* y = item.batch.y + (row * item.layer.shape.value_heads + item.head * group + w) * M;
      const float mean = dot(o, o, M) / static_cast<float>(M);
      const Vec factor = Vec::set(1.0f / sqrtf(mean + item.layer.eps));
      for (int64_t i = 0; i < M; i += Vec::width) {
        const int64_t left = M - i;
        const Vec normed = load_some(o + i, left) * factor * load_some(weight + i, left);
        store_some(normed * silu(load_some(z + i, left)), y + i, left);
      }
    }
  }
}

// -- a whole item --------------------------------------------------------------------------------------

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
      const int64_t head = item.head * group + w, at = w * kDeltaChunk + t;
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

void run_item(const Item& item, Scratch& x, int64_t step_tokens) {
  const DeltaSequence& sequence = item.sequence;
  const DeltaShape& s = item.layer.shape;
  if (sequence.tokens == 0 && sequence.kept == 0) return;
  const int64_t head_size = s.key_dim * s.value_dim;
  float* state = sequence.state + item.head * item.group * head_size;
  const bool by_step = sequence.speculative || sequence.tokens <= step_tokens;
  int64_t kept = sequence.kept;
  read_history(item, x);
  if (kept && (sequence.speculative || sequence.tokens == 0)) {
    write_window(item, x, sequence.window);
  }
  if (kept && (!by_step || sequence.tokens == 0)) {
    x.block.tokens = 0;
    for (int64_t w = 0; w < item.group; ++w) {
      delta_step(x.block, w, state + w * head_size, kept_updates(item, x, w), kept, false);
    }
    kept = 0;
  }
  for (int64_t done = 0; done < sequence.tokens;) {
    const int64_t end = piece_end(sequence, done);
    while (done < end) {
      const int64_t tokens = end - done < kDeltaChunk ? end - done : kDeltaChunk;
      prepare(item, x, done, tokens);
      for (int64_t w = 0; w < item.group; ++w) {
        float* one = state + w * head_size;
        if (by_step) {
          delta_step(x.block, w, one, kept_updates(item, x, w), kept, sequence.speculative);
        } else {
          delta_chunk(x.block, w, one, w == 0);
        }
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
  int64_t before = 0;
  for (int64_t u = 0; u < U; ++u) {
    for (int64_t b = 0; b < batch.num_sequences; ++b) {
      const DeltaSequence& sequence = batch.sequences[b];
      const int64_t own = cost(sequence);
      // An item belongs to the thread in whose share of the cost its middle lies.
      const bool mine = own && (2 * before + own) * team.threads / (2 * total) == team.thread;
      before += own;
      if (!mine) continue;
      const Section sections[3] = {{0, u * K, K},
                                   {K, (U + u) * K, K},
                                   {2 * K, 2 * U * K + u * group * M, group * M}};
      const Item item = {layer, batch, sequence, u, group, 2 * K + group * M,
                         {sections[0], sections[1], sections[2]}};
      run_item(item, x, batch.step_tokens);
    }
  }
}

}  // namespace

const DeltaKernels delta_kernels = {scratch_bytes, forward};

}  // namespace qnext::QNEXT_ISA
