// Causal attention for training in blocks of queries and keys: scores of a block live in a core's
// cache, forward with a running maximum (Dao et al. 2022, arXiv 2205.14135), backward from the
// logarithms it leaves. Shares and slopes are rounded to the type of the inputs before they are
// multiplied; sums are float32.
#include "training_attention.h"

#include <math.h>

#include "packed_product.h"
#include "softmax_rows.h"
#include "training_memory.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t kBlock = 64;

int64_t blocks_of(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }
int64_t block_size(int64_t tokens, int64_t block) {
  const int64_t left = tokens - block * kBlock;
  return left < kBlock ? left : kBlock;
}

template <class T>
const Lane* lanes(const T* p) {
  return reinterpret_cast<const Lane*>(p);
}

int64_t longest(const AttentionCall& c) {
  int64_t most = 0;
  for (int64_t b = 0; b < c.documents; ++b) {
    const int64_t tokens = c.starts[b + 1] - c.starts[b];
    most = tokens > most ? tokens : most;
  }
  return most;
}

// Keys of block j that row r of query block i sees.
int64_t visible(int64_t i, int64_t j, int64_t r, int64_t keys) {
  const int64_t seen = (i - j) * kBlock + r + 1;
  return seen < keys ? seen : keys;
}

// share = exp(scale x - top) for the first `seen` numbers, 0 up to kBlock; returns their sum.
template <class T>
float shares(const float* x, int64_t seen, float scale, float top, T* share) {
  const Vec by = Vec::set(scale), minus = Vec::set(-top);
  Vec sum = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::width <= seen; i += Vec::width) {
    const Vec e = exp(fma(Vec::load(x + i), by, minus));
    sum = sum + e;
    e.store(share + i);
  }
  float total = sum.sum();
  if (i < seen) {
    float part[Vec::width];
    exp(fma(load_some(x + i, seen - i), by, minus)).store(part);
    for (; i < seen; ++i) {
      total += part[i % Vec::width];
      share[i] = as_number<T>(part[i % Vec::width]);
    }
  }
  for (; i < kBlock; ++i) share[i] = T{};
  return total;
}

template <class T>
struct Heads {
  const AttentionCall& c;
  int64_t H, N, G, group, q_row, k_row;
  explicit Heads(const AttentionCall& call)
      : c(call), H(call.width), N(call.query_heads), G(call.key_heads), group(N / G),
        q_row(N * H), k_row(G * H) {}
  const T* q(int64_t p, int64_t n) const { return static_cast<const T*>(c.q) + p * q_row + n * H; }
  const T* k(int64_t p, int64_t g) const { return static_cast<const T*>(c.k) + p * k_row + g * H; }
  const T* v(int64_t p, int64_t g) const { return static_cast<const T*>(c.v) + p * k_row + g * H; }
  T* y(int64_t p, int64_t n) const { return static_cast<T*>(c.y) + p * q_row + n * H; }
  const T* d_y(int64_t p, int64_t n) const {
    return static_cast<const T*>(c.d_y) + p * q_row + n * H;
  }
};

// Scratch of one query block, forward.
template <class T>
struct Running {
  float* scores;  // [kBlock][kBlock]
  T* share;       // [kBlock][kBlock]
  float* sums;    // [kBlock][H], of shares times values
  float* top;     // [kBlock], largest score so far, scaled
  float* mass;    // [kBlock], sum of the shares
  float* shrink;  // [kBlock]
};

// One block of keys for the queries of block i, whose first row is q[0].
template <class T>
void meet(const Heads<T>& h, const Running<T>& s, const Lane* const* q, int64_t rows, int64_t i,
          int64_t j, int64_t keys, const Lane* k_packed, const Lane* v_packed) {
  const int64_t H = h.H;
  const float scale = h.c.scale;
  void* out[kBlock];
  const Lane* left[kBlock];
  for (int64_t r = 0; r < rows; ++r) out[r] = s.scores + r * kBlock;
  product<T>({q, 1}, k_packed, lanes_of<T>(H), rows, keys, out, Put::set);
  for (int64_t r = 0; r < rows; ++r) {
    const float best = scale * row_maximum(s.scores + r * kBlock, visible(i, j, r, keys));
    const float top = best > s.top[r] ? best : s.top[r];
    s.shrink[r] = s.top[r] - top;
    s.top[r] = top;
  }
  for (int64_t r = 0; r < kBlock; r += Vec::width) exp(Vec::load(s.shrink + r)).store(s.shrink + r);
  for (int64_t r = 0; r < rows; ++r) {
    const float added = shares(s.scores + r * kBlock, visible(i, j, r, keys), scale, s.top[r],
                               s.share + r * kBlock);
    s.mass[r] = s.mass[r] * s.shrink[r] + added;
    float* sums = s.sums + r * H;
    if (s.shrink[r] != 1.0f) {
      const Vec by = Vec::set(s.shrink[r]);
      for (int64_t x = 0; x < H; x += Vec::width) {
        store_some(by * load_some(sums + x, H - x), sums + x, H - x);
      }
    }
    left[r] = lanes(s.share + r * kBlock);
    out[r] = sums;
  }
  product<T>({left, 1}, v_packed, lanes_of<T>(keys), rows, H, out, Put::add);
}

// Scores are multiplied with a positive scale: their maximum is scaled with them.
template <class T>
bool forward(const AttentionCall& c) {
  const Heads<T> h(c);
  const int64_t H = h.H, most = blocks_of(longest(c));
  const int64_t k_lanes = packed_lanes<T>(kBlock, H), v_lanes = packed_lanes<T>(H, kBlock);
  Memory memory;
  Running<T> s;
  Lane* k_packed = memory.take<Lane>(most * k_lanes);
  Lane* v_packed = memory.take<Lane>(most * v_lanes);
  s.scores = memory.take<float>(kBlock * kBlock);
  s.share = memory.take<T>(kBlock * kBlock);
  s.sums = memory.take<float>(kBlock * H);
  s.top = memory.take<float>(kBlock);
  s.mass = memory.take<float>(kBlock);
  s.shrink = memory.take<float>(kBlock);
  if (!memory.obtain()) return false;
  memory.place(&k_packed, &v_packed, &s.scores, &s.share, &s.sums, &s.top, &s.mass, &s.shrink);
  memset(s.shrink, 0, kBlock * sizeof(float));
  for (int64_t b = 0; b < c.documents; ++b) {
    const int64_t begin = c.starts[b], tokens = c.starts[b + 1] - begin;
    for (int64_t g = 0; g < h.G; ++g) {
      for (int64_t j = 0; j < blocks_of(tokens); ++j) {
        const int64_t first = begin + j * kBlock, keys = block_size(tokens, j);
        const T* values[kBlock];
        for (int64_t r = 0; r < keys; ++r) values[r] = h.v(first + r, g);
        pack_columns(h.k(first, g), keys, H, h.k_row, k_packed + j * k_lanes);
        pack_rows(values, keys, H, kPanel, v_packed + j * v_lanes);
      }
      for (int64_t n = g * h.group; n < (g + 1) * h.group; ++n) {
        for (int64_t i = 0; i < blocks_of(tokens); ++i) {
          const int64_t first = begin + i * kBlock, rows = block_size(tokens, i);
          const Lane* q[kBlock];
          for (int64_t r = 0; r < rows; ++r) {
            q[r] = lanes(h.q(first + r, n));
            s.top[r] = -INFINITY;
            s.mass[r] = 0.0f;
          }
          memset(s.sums, 0, static_cast<size_t>(rows * H) * sizeof(float));
          for (int64_t j = 0; j <= i; ++j) {
            meet(h, s, q, rows, i, j, block_size(tokens, j), k_packed + j * k_lanes,
                 v_packed + j * v_lanes);
          }
          for (int64_t r = 0; r < rows; ++r) {
            c.lse[(first + r) * h.N + n] = s.top[r] + logf(s.mass[r]);
            const Vec by = Vec::set(1.0f / s.mass[r]);
            T* y = h.y(first + r, n);
            for (int64_t x = 0; x < H; x += Vec::width) {
              store_some(by * load_some(s.sums + r * H + x, H - x), y + x, H - x);
            }
          }
        }
      }
    }
  }
  return true;
}

// -- backward --------------------------------------------------------------------------------------

// Scratch of one key block, backward.
template <class T>
struct Slopes {
  float* scores;    // [kBlock][kBlock]
  float* d_share;   // [kBlock][kBlock]
  T* share;         // [kBlock][kBlock]
  T* d_scores;      // [kBlock][kBlock]
  Lane* turned;     // [kBlock / per lane][kBlock]
  Lane* k_columns;  // packed for scores
  Lane* v_columns;  // packed for d_share
  Lane* k_rows;     // packed for d_q
  float* d_k;       // [kBlock][H]
  float* d_v;
  Lane* q_rows;    // [group][blocks], packed for d_k
  Lane* d_y_rows;  // [group][blocks], packed for d_v
  float* d_q;      // [group][tokens][H]
  float* along;    // [group][tokens], d_y . y
};

// share = exp(scale score - lse) and d_score = share (d_share - along) scale, 0 where not visible.
template <class T>
void slopes(const float* score, const float* d_share, int64_t seen, float scale, float lse,
            float along, T* share, T* d_score) {
  const Vec by = Vec::set(scale), minus = Vec::set(-lse), less = Vec::set(along);
  for (int64_t i = 0; i < kBlock; i += Vec::width) {
    if (i >= seen) {
      for (int64_t x = i; x < i + Vec::width; ++x) share[x] = d_score[x] = T{};
      continue;
    }
    const Vec p = exp(fma(Vec::load(score + i), by, minus));
    const Vec d = p * (Vec::load(d_share + i) - less) * by;
    p.store(share + i);
    d.store(d_score + i);
    for (int64_t x = seen; x < i + Vec::width; ++x) share[x] = d_score[x] = T{};
  }
}

// Adds to[j][x] += sum over rows r of weight[r][j] packed[r][x].
template <class T>
void add_turned(const Slopes<T>& s, const T* weight, int64_t rows, int64_t keys,
                const Lane* packed, int64_t H, float* to) {
  const T* weights[kBlock];
  const Lane* left[kBlock];
  void* out[kBlock];
  for (int64_t r = 0; r < rows; ++r) weights[r] = weight + r * kBlock;
  pack_rows(weights, rows, kBlock, kBlock, s.turned);
  for (int64_t r = 0; r < keys; ++r) {
    left[r] = s.turned + r;
    out[r] = to + r * H;
  }
  product<T>({left, kBlock}, packed, lanes_of<T>(rows), keys, H, out, Put::add);
}

template <class T>
void block_backward(const Heads<T>& h, const Slopes<T>& s, int64_t begin, int64_t tokens, int64_t n,
                    int64_t i, int64_t j) {
  const int64_t H = h.H, first = begin + i * kBlock, rows = block_size(tokens, i);
  const int64_t keys = block_size(tokens, j), place = n % h.group;
  const Lane* q[kBlock];
  const Lane* d_y[kBlock];
  void* out[kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    q[r] = lanes(h.q(first + r, n));
    d_y[r] = lanes(h.d_y(first + r, n));
    out[r] = s.scores + r * kBlock;
  }
  product<T>({q, 1}, s.k_columns, lanes_of<T>(H), rows, keys, out, Put::set);
  for (int64_t r = 0; r < rows; ++r) out[r] = s.d_share + r * kBlock;
  product<T>({d_y, 1}, s.v_columns, lanes_of<T>(H), rows, keys, out, Put::set);
  const float* along = s.along + place * tokens + i * kBlock;
  for (int64_t r = 0; r < rows; ++r) {
    slopes(s.scores + r * kBlock, s.d_share + r * kBlock, visible(i, j, r, keys), h.c.scale,
           h.c.lse[(first + r) * h.N + n], along[r], s.share + r * kBlock,
           s.d_scores + r * kBlock);
  }
  const int64_t packed = (place * blocks_of(tokens) + i) * packed_lanes<T>(H, kBlock);
  add_turned(s, s.share, rows, keys, s.d_y_rows + packed, H, s.d_v);
  add_turned(s, s.d_scores, rows, keys, s.q_rows + packed, H, s.d_k);
  const Lane* left[kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    left[r] = lanes(s.d_scores + r * kBlock);
    out[r] = s.d_q + (place * tokens + i * kBlock + r) * H;
  }
  product<T>({left, 1}, s.k_rows, lanes_of<T>(keys), rows, H, out, Put::add);
}

template <class T>
void round_row(const float* from, int64_t count, T* to) {
  for (int64_t x = 0; x < count; x += Vec::width) {
    store_some(load_some(from + x, count - x), to + x, count - x);
  }
}

// What all key blocks of a document read of the queries of one key head.
template <class T>
void pack_queries(const Heads<T>& h, const Slopes<T>& s, int64_t begin, int64_t tokens, int64_t g) {
  const int64_t H = h.H, blocks = blocks_of(tokens), size = packed_lanes<T>(H, kBlock);
  for (int64_t place = 0; place < h.group; ++place) {
    const int64_t n = g * h.group + place;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = begin + i * kBlock, rows = block_size(tokens, i);
      const T* of[kBlock];
      for (int64_t r = 0; r < rows; ++r) of[r] = h.q(first + r, n);
      pack_rows(of, rows, H, kPanel, s.q_rows + (place * blocks + i) * size);
      for (int64_t r = 0; r < rows; ++r) of[r] = h.d_y(first + r, n);
      pack_rows(of, rows, H, kPanel, s.d_y_rows + (place * blocks + i) * size);
      for (int64_t r = 0; r < rows; ++r) {
        const T* y = h.y(first + r, n);
        Vec sum = Vec::zero();
        for (int64_t x = 0; x < H; x += Vec::width) {
          sum = fma(load_some(of[r] + x, H - x), load_some(y + x, H - x), sum);
        }
        s.along[place * tokens + i * kBlock + r] = sum.sum();
      }
    }
  }
  memset(s.d_q, 0, static_cast<size_t>(h.group * tokens * H) * sizeof(float));
}

template <class T>
bool backward(const AttentionCall& c) {
  const Heads<T> h(c);
  const int64_t H = h.H, tokens_most = longest(c), most = blocks_of(tokens_most);
  Memory memory;
  Slopes<T> s;
  s.scores = memory.take<float>(kBlock * kBlock);
  s.d_share = memory.take<float>(kBlock * kBlock);
  s.share = memory.take<T>(kBlock * kBlock);
  s.d_scores = memory.take<T>(kBlock * kBlock);
  s.turned = memory.take<Lane>(kBlock * kBlock);
  s.k_columns = memory.take<Lane>(packed_lanes<T>(kBlock, H));
  s.v_columns = memory.take<Lane>(packed_lanes<T>(kBlock, H));
  s.k_rows = memory.take<Lane>(packed_lanes<T>(H, kBlock));
  s.d_k = memory.take<float>(kBlock * H);
  s.d_v = memory.take<float>(kBlock * H);
  s.q_rows = memory.take<Lane>(h.group * most * packed_lanes<T>(H, kBlock));
  s.d_y_rows = memory.take<Lane>(h.group * most * packed_lanes<T>(H, kBlock));
  s.d_q = memory.take<float>(h.group * tokens_most * H);
  s.along = memory.take<float>(h.group * tokens_most);
  if (!memory.obtain()) return false;
  memory.place(&s.scores, &s.d_share, &s.share, &s.d_scores, &s.turned, &s.k_columns, &s.v_columns,
               &s.k_rows, &s.d_k, &s.d_v, &s.q_rows, &s.d_y_rows, &s.d_q, &s.along);
  // Columns of a block that has fewer keys are read, and never used.
  memset(s.scores, 0, kBlock * kBlock * sizeof(float));
  memset(s.d_share, 0, kBlock * kBlock * sizeof(float));
  const size_t block_bytes = static_cast<size_t>(kBlock * H) * sizeof(float);
  for (int64_t b = 0; b < c.documents; ++b) {
    const int64_t begin = c.starts[b], tokens = c.starts[b + 1] - begin, blocks = blocks_of(tokens);
    for (int64_t g = 0; g < h.G; ++g) {
      pack_queries(h, s, begin, tokens, g);
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t first = begin + j * kBlock, keys = block_size(tokens, j);
        const T* of[kBlock];
        for (int64_t r = 0; r < keys; ++r) of[r] = h.k(first + r, g);
        pack_rows(of, keys, H, kPanel, s.k_rows);
        pack_columns(h.k(first, g), keys, H, h.k_row, s.k_columns);
        pack_columns(h.v(first, g), keys, H, h.k_row, s.v_columns);
        memset(s.d_k, 0, block_bytes);
        memset(s.d_v, 0, block_bytes);
        for (int64_t n = g * h.group; n < (g + 1) * h.group; ++n) {
          for (int64_t i = j; i < blocks; ++i) block_backward(h, s, begin, tokens, n, i, j);
        }
        for (int64_t r = 0; r < keys; ++r) {
          const int64_t at = (first + r) * h.k_row + g * H;
          round_row(s.d_k + r * H, H, static_cast<T*>(c.d_k) + at);
          round_row(s.d_v + r * H, H, static_cast<T*>(c.d_v) + at);
        }
      }
      for (int64_t place = 0; place < h.group; ++place) {
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t at = (begin + t) * h.q_row + (g * h.group + place) * H;
          round_row(s.d_q + (place * tokens + t) * H, H, static_cast<T*>(c.d_q) + at);
        }
      }
    }
  }
  return true;
}

}  // namespace

bool attention_forward(const AttentionCall& call) {
  return call.number == Number::f32 ? forward<float>(call) : forward<bf16>(call);
}

bool attention_backward(const AttentionCall& call) {
  return call.number == Number::f32 ? backward<float>(call) : backward<bf16>(call);
}

}  // namespace qnext::QNEXT_ISA
