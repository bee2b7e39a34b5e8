// A delta layer between its projections, forward and backward: convolution, SiLU, unit lengths,
// gates, the delta rule and the gated norm. One key head of one document after the other, chunk by
// chunk, so that everything of a chunk stays in a core's cache and no document sees another.
//
// Kept for backward are the input, the states that enter the chunks, what the tokens write and what
// the queries read; convolution, gates and the products of a chunk are computed again.
#include <math.h>

#include "training_delta.h"
#include "training_memory.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr float kEpsilon = 1e-6f;  // of the norm of queries and keys

// Sizes and the memory of one call.
template <class T>
struct Layer {
  const DeltaLayerCall& call;
  int64_t U, W, K, M, J, C, r;
  int64_t mixed_width;  // channels of one key head that are convolved: 2 K + r M
  int64_t segment;      // and with its gates: numbers of one key head in a row of qkvz
  int64_t row, ba_row;

  explicit Layer(const DeltaLayerCall& c)
      : call(c), U(c.key_heads), W(c.value_heads), K(c.key_dim), M(c.value_dim), J(c.taps),
        C(c.chunk), r(c.value_heads / c.key_heads), mixed_width(2 * K + r * M),
        segment(2 * K + 2 * r * M), row(U * segment), ba_row(2 * W) {}

  const T* input(int64_t p, int64_t u) const {
    return static_cast<const T*>(call.qkvz) + p * row + u * segment;
  }
  const T* gate(int64_t p, int64_t u, int64_t w) const {
    return input(p, u) + mixed_width + w * M;
  }
  const T* ba(int64_t p, int64_t u) const {
    return static_cast<const T*>(call.ba) + p * ba_row + u * 2 * r;
  }
  // Channel number of the checkpoint of channel x of key head u.
  int64_t channel(int64_t u, int64_t x) const {
    if (x < K) return u * K + x;
    if (x < 2 * K) return U * K + u * K + x - K;
    return 2 * U * K + u * r * M + x - 2 * K;
  }
};

// Scratch of one key head's chunk.
struct Scratch {
  float* taps;   // [J][mixed width]
  float* mixed;  // [C][mixed width], sums over taps
  float* q_size; // [C], what a raw query was multiplied by
  float* k_size;
  float* v;      // [r][C][M]
  float* g;      // [r][C]
  float* beta;
  float *q, *k, *kt, *kk, *qk;                  // of KeyHead
  float *sum, *rest, *entry, *exit, *decay, *solve, *read;  // of Decays
  float* written;  // [C][M], of one value head
  float* out;
  float* scaled;

  template <class T>
  void take(Memory& memory, const Layer<T>& l) {
    const int64_t C = l.C, K = l.K, M = l.M, r = l.r;
    taps = memory.take<float>(l.J * l.mixed_width);
    mixed = memory.take<float>(C * l.mixed_width);
    q_size = memory.take<float>(C);
    k_size = memory.take<float>(C);
    v = memory.take<float>(r * C * M);
    g = memory.take<float>(r * C);
    beta = memory.take<float>(r * C);
    q = memory.take<float>(C * K);
    k = memory.take<float>(C * K);
    kt = memory.take<float>(K * C);
    kk = memory.take<float>(C * C);
    qk = memory.take<float>(C * C);
    sum = memory.take<float>(C);
    rest = memory.take<float>(C);
    entry = memory.take<float>(C);
    exit = memory.take<float>(C);
    decay = memory.take<float>(C * C);
    solve = memory.take<float>(C * C);
    read = memory.take<float>(C * C);
    written = memory.take<float>(C * M);
    out = memory.take<float>(C * M);
    scaled = memory.take<float>(C * M);
  }
  void place(const Memory& memory) {
    memory.place(&taps, &mixed, &q_size, &k_size, &v, &g, &beta, &q, &k, &kt, &kk, &qk, &sum, &rest,
                 &entry, &exit, &decay, &solve, &read, &written, &out, &scaled);
  }
  KeyHead key_head(int64_t tokens, int64_t C, int64_t K, int64_t M) const {
    return {tokens, C, K, M, q, k, kt, kk, qk};
  }
  Decays head(int64_t w, int64_t C) const {
    return {g + w * C, beta + w * C, sum, rest, entry, exit, decay, solve, read};
  }
};

// Asks for memory that will be read soon.
template <class T>
void ask(const T* from, int64_t count) {
  const char* p = reinterpret_cast<const char*>(from);
  const char* end = reinterpret_cast<const char*>(from + count);
  for (; p < end; p += 64) __builtin_prefetch(p, 0, 2);
}

template <class T>
void load_taps(const Layer<T>& l, int64_t u, float* taps) {
  for (int64_t x = 0; x < l.mixed_width; ++x) {
    const float* weight = l.call.conv + l.channel(u, x) * l.J;
    for (int64_t j = 0; j < l.J; ++j) taps[j * l.mixed_width + x] = weight[j];
  }
}

float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

// One row divided by its length and multiplied by `scale`; returns the inverse length.
float to_unit(const float* raw, int64_t count, float scale, float* out) {
  Vec squares = Vec::zero();
  for (int64_t i = 0; i < count; i += Vec::width) {
    const Vec x = silu(load_some(raw + i, count - i));
    squares = fma(x, x, squares);
    store_some(x, out + i, count - i);
  }
  const float inverse = 1.0f / sqrtf(squares.sum() + kEpsilon);
  const Vec by = Vec::set(inverse * scale);
  for (int64_t i = 0; i < count; i += Vec::width) {
    store_some(by * load_some(out + i, count - i), out + i, count - i);
  }
  return inverse;
}

// Sums over the taps of one row, of which it sees `seen` rows, itself and those before it.
template <class T>
void mix(const T* x, int64_t stride, const float* taps, int64_t J, int64_t seen, int64_t L,
         float* out) {
  if (seen == 4 && J == 4) {
    const float *t0 = taps + 3 * L, *t1 = t0 - L, *t2 = t1 - L, *t3 = taps;
    for (int64_t i = 0; i < L; i += Vec::width) {
      const int64_t n = L - i;
      Vec sum = fma(load_some(x + i, n), load_some(t0 + i, n), Vec::zero());
      sum = fma(load_some(x - stride + i, n), load_some(t1 + i, n), sum);
      sum = fma(load_some(x - 2 * stride + i, n), load_some(t2 + i, n), sum);
      sum = fma(load_some(x - 3 * stride + i, n), load_some(t3 + i, n), sum);
      store_some(sum, out + i, n);
    }
    return;
  }
  for (int64_t i = 0; i < L; i += Vec::width) {
    const int64_t n = L - i;
    Vec sum = Vec::zero();
    for (int64_t back = 0; back < seen; ++back) {
      sum = fma(load_some(x - back * stride + i, n), load_some(taps + (J - 1 - back) * L + i, n),
                sum);
    }
    store_some(sum, out + i, n);
  }
}

// Tokens first ... first + tokens - 1 of the document that begins at `begin`, ready for the core.
// Rows that far from them (`next`) are read after these.
template <class T>
void prepare(const Layer<T>& l, const Scratch& s, int64_t u, int64_t begin, int64_t first,
             int64_t tokens, int64_t next) {
  const int64_t L = l.mixed_width, K = l.K, M = l.M, C = l.C;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t p = first + t, seen = p - begin + 1;
    if (p + next >= 0 && p + next < l.call.tokens) ask(l.input(p + next, u), l.segment);
    mix(l.input(p, u), l.row, s.taps, l.J, seen < l.J ? seen : l.J, L, s.mixed + t * L);
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(K));
  for (int64_t t = 0; t < tokens; ++t) {
    const float* mixed = s.mixed + t * L;
    s.q_size[t] = to_unit(mixed, K, scale, s.q + t * K);
    s.k_size[t] = to_unit(mixed + K, K, 1.0f, s.k + t * K);
    const T* ba = l.ba(first + t, u);
    for (int64_t w = 0; w < l.r; ++w) {
      const float* raw = mixed + 2 * K + w * M;
      float* v = s.v + (w * C + t) * M;
      for (int64_t m = 0; m < M; m += Vec::width) {
        store_some(silu(load_some(raw + m, M - m)), v + m, M - m);
      }
      const int64_t head = u * l.r + w;
      s.beta[w * C + t] = logistic(as_float(ba[w]));
      s.g[w * C + t] = -expf(l.call.a_log[head]) *
                       softplus(as_float(ba[l.r + w]) + l.call.dt_bias[head]);
    }
  }
}

float inverse_rms(const float* x, int64_t count, float eps) {
  Vec squares = Vec::zero();
  for (int64_t i = 0; i < count; i += Vec::width) {
    const Vec v = load_some(x + i, count - i);
    squares = fma(v, v, squares);
  }
  return 1.0f / sqrtf(squares.sum() / static_cast<float>(count) + eps);
}

template <class T>
bool forward(const DeltaLayerCall& call) {
  const Layer<T> l(call);
  const int64_t K = l.K, M = l.M, C = l.C, W = l.W;
  Memory memory;
  Scratch s;
  s.take(memory, l);
  if (!memory.obtain()) return false;
  s.place(memory);
  for (int64_t u = 0; u < l.U; ++u) {
    load_taps(l, u, s.taps);
    int64_t chunk = 0;
    for (int64_t b = 0; b < call.documents; ++b) {
      const int64_t begin = call.starts[b], end = call.starts[b + 1];
      for (int64_t first = begin; first < end; first += C, ++chunk) {
        const int64_t tokens = end - first < C ? end - first : C;
        const bool last = first + tokens == end;
        prepare(l, s, u, begin, first, tokens, C);
        const KeyHead x = s.key_head(tokens, C, K, M);
        key_products(x);
        for (int64_t w = 0; w < l.r; ++w) {
          const int64_t head = u * l.r + w;
          float* state = call.states + (chunk * W + head) * K * M;
          if (first == begin) memset(state, 0, static_cast<size_t>(K * M) * sizeof(float));
          const Decays y = s.head(w, C);
          decays(x, y);
          core_forward(x, y, state, s.v + w * C * M, s.written, s.out,
                       last ? nullptr : state + W * K * M, s.scaled);
          for (int64_t t = 0; t < tokens; ++t) {
            const int64_t at = ((first + t) * W + head) * M;
            const float* out = s.out + t * M;
            memcpy(call.written + at, s.written + t * M, static_cast<size_t>(M) * sizeof(float));
            memcpy(call.out + at, out, static_cast<size_t>(M) * sizeof(float));
            const Vec inverse = Vec::set(inverse_rms(out, M, call.eps));
            const T* gate = l.gate(first + t, u, w);
            for (int64_t m = 0; m < M; m += Vec::width) {
              const int64_t n = M - m;
              const Vec normed = load_some(out + m, n) * inverse * load_some(call.norm + m, n);
              store_some(normed * silu(load_some(gate + m, n)),
                         static_cast<T*>(call.y) + at + m, n);
            }
          }
        }
      }
    }
  }
  return true;
}

// -- backward --------------------------------------------------------------------------------------

// Gradients of one key head's chunk, and of its weights so far.
struct Gradients {
  float* core;     // work of core_backward
  float* d_state;  // [r][K][M]
  float* d_out;    // [C][M]
  float* d_q;      // [C][K]
  float* d_k;
  float* d_v;      // [r][C][M]
  float* d_g;      // [r][C]
  float* d_b;
  float* d_mixed;  // [C + J - 1][mixed width]: this chunk's rows, then those that follow
  float* d_norm;   // [M], of one chunk
  double* taps;    // [J][mixed width]
  double* norm;    // [M]

  template <class T>
  void take(Memory& memory, const Layer<T>& l) {
    const int64_t C = l.C, K = l.K, M = l.M, r = l.r;
    core = memory.take<float>(core_work(C, K, M));
    d_state = memory.take<float>(r * K * M);
    d_out = memory.take<float>(C * M);
    d_q = memory.take<float>(C * K);
    d_k = memory.take<float>(C * K);
    d_v = memory.take<float>(r * C * M);
    d_g = memory.take<float>(r * C);
    d_b = memory.take<float>(r * C);
    d_mixed = memory.take<float>((C + l.J - 1) * l.mixed_width);
    d_norm = memory.take<float>(M);
    taps = memory.take<double>(l.J * l.mixed_width);
    norm = memory.take<double>(M);
  }
  void place(const Memory& memory) {
    memory.place(&core, &d_state, &d_out, &d_q, &d_k, &d_v, &d_g, &d_b, &d_mixed, &d_norm, &taps,
                 &norm);
  }
};

// Through the gated norm of one row: gradients of what the queries read and of the gate; that of the
// weight is added.
template <class T>
void through_norm(const float* out, const T* gate, const T* d_y, const float* weight, float eps,
                  int64_t M, float* d_out, T* d_gate, float* d_weight) {
  const float size = inverse_rms(out, M, eps);
  const Vec inverse = Vec::set(size), one = Vec::set(1.0f);
  Vec along = Vec::zero();
  for (int64_t m = 0; m < M; m += Vec::width) {
    const int64_t n = M - m;
    const Vec normed = load_some(out + m, n) * inverse, z = load_some(gate + m, n);
    const Vec d = load_some(d_y + m, n), w = load_some(weight + m, n);
    const Vec open = sigmoid(z);
    const Vec d_opened = d * z * open;
    store_some(fma(d_opened, normed, load_some(d_weight + m, n)), d_weight + m, n);
    store_some(d * normed * w * open * fma(z, one - open, one), d_gate + m, n);
    const Vec d_normed = d_opened * w;
    along = fma(d_normed, normed, along);
    store_some(d_normed, d_out + m, n);
  }
  const Vec mean = Vec::set(along.sum() / static_cast<float>(M));
  for (int64_t m = 0; m < M; m += Vec::width) {
    const int64_t n = M - m;
    const Vec normed = load_some(out + m, n) * inverse;
    store_some((load_some(d_out + m, n) - normed * mean) * inverse, d_out + m, n);
  }
}

// From the gradient of a unit row to that of its sums over taps, through length and SiLU.
void through_unit(const float* d, const float* unit, const float* mixed, float size, float scale,
                  int64_t count, float* d_mixed) {
  Vec along = Vec::zero();
  for (int64_t i = 0; i < count; i += Vec::width) {
    along = fma(load_some(d + i, count - i), load_some(unit + i, count - i), along);
  }
  const Vec mean = Vec::set(along.sum() / scale), by = Vec::set(size);
  const Vec factor = Vec::set(scale), one = Vec::set(1.0f);
  for (int64_t i = 0; i < count; i += Vec::width) {
    const int64_t n = count - i;
    const Vec raw = load_some(mixed + i, n), open = sigmoid(raw);
    const Vec slope = open * fma(raw, one - open, one);
    const Vec d_act = (load_some(d + i, n) * factor - load_some(unit + i, n) * mean) * by;
    store_some(d_act * slope, d_mixed + i, n);
  }
}

// The convolution of one chunk, backwards: gradients of its inputs and, added, of the taps.
template <class T>
void through_taps(const Layer<T>& l, const Scratch& s, const Gradients& z, int64_t u, int64_t begin,
                  int64_t first, int64_t tokens) {
  const int64_t L = l.mixed_width, J = l.J;
  T* d_row = static_cast<T*>(l.call.d_qkvz) + first * l.row + u * l.segment;
  for (int64_t x = 0; x < L; x += Vec::width) {
    const int64_t n = L - x;
    for (int64_t t = 0; t < tokens; ++t) {
      Vec sum = Vec::zero();
      for (int64_t ahead = 0; ahead < J; ++ahead) {
        sum = fma(load_some(z.d_mixed + (t + ahead) * L + x, n),
                  load_some(s.taps + (J - 1 - ahead) * L + x, n), sum);
      }
      store_some(sum, d_row + t * l.row + x, n);
    }
    for (int64_t back = 0; back < J; ++back) {
      Vec sum = Vec::zero();
      const int64_t from = first - back < begin ? begin + back - first : 0;
      for (int64_t t = from; t < tokens; ++t) {
        sum = fma(load_some(z.d_mixed + t * L + x, n),
                  load_some(l.input(first + t - back, u) + x, n), sum);
      }
      float part[Vec::width];
      sum.store(part);
      double* total = z.taps + (J - 1 - back) * L + x;
      for (int64_t i = 0; i < Vec::width && i < n; ++i) total[i] += static_cast<double>(part[i]);
    }
  }
}

// One chunk of one key head; `chunk` is its number in `states`.
template <class T>
void chunk_backward(const Layer<T>& l, const Scratch& s, const Gradients& z, int64_t u,
                    int64_t begin, int64_t first, int64_t tokens, int64_t chunk, double* d_a_log,
                    double* d_dt_bias) {
  const DeltaLayerCall& call = l.call;
  const int64_t K = l.K, M = l.M, C = l.C, W = l.W, L = l.mixed_width;
  prepare(l, s, u, begin, first, tokens, -C);
  const KeyHead x = s.key_head(tokens, C, K, M);
  key_products(x);
  memset(z.d_q, 0, static_cast<size_t>(tokens * K) * sizeof(float));
  memset(z.d_k, 0, static_cast<size_t>(tokens * K) * sizeof(float));
  memset(z.d_norm, 0, static_cast<size_t>(M) * sizeof(float));
  for (int64_t w = 0; w < l.r; ++w) {
    const int64_t head = u * l.r + w;
    const float* state = call.states + (chunk * W + head) * K * M;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t p = first + t, at = (p * W + head) * M, before = at - C * W * M;
      if (p >= C) {  // the chunk before is next
        ask(call.out + before, M);
        ask(call.written + before, M);
        ask(static_cast<const T*>(call.d_y) + before, M);
      }
      if (chunk) ask(state - W * K * M + t * K * M / C, K * M / C);
      T* d_gate = static_cast<T*>(call.d_qkvz) + p * l.row + u * l.segment + L + w * M;
      through_norm(call.out + at, l.gate(p, u, w), static_cast<const T*>(call.d_y) + at, call.norm,
                   call.eps, M, z.d_out + t * M, d_gate, z.d_norm);
      memcpy(s.written + t * M, call.written + at, static_cast<size_t>(M) * sizeof(float));
    }
    const Decays y = s.head(w, C);
    decays(x, y);
    float* d_v = z.d_v + w * C * M;
    core_backward(x, y, {state, s.written, z.d_out, z.d_state + w * K * M, z.d_q, z.d_k, d_v,
                         z.d_g + w * C, z.d_b + w * C, z.core});
    const float rate = -expf(call.a_log[head]);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t p = first + t;
      T* d_ba = static_cast<T*>(call.d_ba) + p * l.ba_row + u * 2 * l.r;
      const float d_g = z.d_g[w * C + t];
      const float a = as_float(l.ba(p, u)[l.r + w]) + call.dt_bias[head];
      const float d_a = d_g * rate * logistic(a);
      d_ba[w] = as_number<T>(z.d_b[w * C + t]);
      d_ba[l.r + w] = as_number<T>(d_a);
      d_a_log[head] += static_cast<double>(d_g) * static_cast<double>(s.g[w * C + t]);
      d_dt_bias[head] += static_cast<double>(d_a);
    }
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(K));
  const Vec one = Vec::set(1.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* mixed = s.mixed + t * L;
    float* d_mixed = z.d_mixed + t * L;
    through_unit(z.d_q + t * K, s.q + t * K, mixed, s.q_size[t], scale, K, d_mixed);
    through_unit(z.d_k + t * K, s.k + t * K, mixed + K, s.k_size[t], 1.0f, K, d_mixed + K);
    for (int64_t w = 0; w < l.r; ++w) {
      const int64_t at = 2 * K + w * M;
      for (int64_t m = 0; m < M; m += Vec::width) {
        const int64_t n = M - m;
        const Vec raw = load_some(mixed + at + m, n), open = sigmoid(raw);
        const Vec slope = open * fma(raw, one - open, one);
        store_some(load_some(z.d_v + (w * C + t) * M + m, n) * slope, d_mixed + at + m, n);
      }
    }
  }
  through_taps(l, s, z, u, begin, first, tokens);
  for (int64_t m = 0; m < M; ++m) z.norm[m] += static_cast<double>(z.d_norm[m]);
}

template <class T>
bool backward(const DeltaLayerCall& call) {
  const Layer<T> l(call);
  const int64_t K = l.K, M = l.M, C = l.C, L = l.mixed_width, J = l.J;
  Memory memory;
  Scratch s;
  Gradients z;
  s.take(memory, l);
  z.take(memory, l);
  double* d_a_log = memory.take<double>(l.W);
  double* d_dt_bias = memory.take<double>(l.W);
  if (!memory.obtain()) return false;
  s.place(memory);
  z.place(memory);
  memory.place(&d_a_log, &d_dt_bias);
  memset(z.norm, 0, static_cast<size_t>(M) * sizeof(double));
  memset(d_a_log, 0, static_cast<size_t>(l.W) * sizeof(double));
  memset(d_dt_bias, 0, static_cast<size_t>(l.W) * sizeof(double));
  const size_t row_bytes = static_cast<size_t>(L) * sizeof(float);
  for (int64_t u = 0; u < l.U; ++u) {
    load_taps(l, u, s.taps);
    memset(z.taps, 0, static_cast<size_t>(J * L) * sizeof(double));
    int64_t before = 0;  // chunks of the documents so far
    for (int64_t b = 0; b < call.documents; ++b) {
      const int64_t begin = call.starts[b], end = call.starts[b + 1];
      const int64_t chunks = (end - begin + C - 1) / C;
      memset(z.d_state, 0, static_cast<size_t>(l.r * K * M) * sizeof(float));
      for (int64_t n = chunks - 1; n >= 0; --n) {
        const int64_t first = begin + n * C, left = end - first;
        const int64_t tokens = left < C ? left : C;
        float* following = z.d_mixed + tokens * L;
        if (n == chunks - 1) {
          memset(following, 0, static_cast<size_t>(J - 1) * row_bytes);
        } else {
          memmove(following, z.d_mixed, static_cast<size_t>(J - 1) * row_bytes);
        }
        chunk_backward(l, s, z, u, begin, first, tokens, before + n, d_a_log, d_dt_bias);
      }
      before += chunks;
    }
    for (int64_t x = 0; x < L; ++x) {
      for (int64_t j = 0; j < J; ++j) {
        call.d_conv[l.channel(u, x) * J + j] = static_cast<float>(z.taps[j * L + x]);
      }
    }
  }
  for (int64_t m = 0; m < M; ++m) call.d_norm[m] = static_cast<float>(z.norm[m]);
  for (int64_t w = 0; w < l.W; ++w) {
    call.d_a_log[w] = static_cast<float>(d_a_log[w]);
    call.d_dt_bias[w] = static_cast<float>(d_dt_bias[w]);
  }
  return true;
}

}  // namespace

bool delta_forward(const DeltaLayerCall& call) {
  return call.number == Number::f32 ? forward<float>(call) : forward<bf16>(call);
}

bool delta_backward(const DeltaLayerCall& call) {
  return call.number == Number::f32 ? backward<float>(call) : backward<bf16>(call);
}

}  // namespace qnext::QNEXT_ISA
