// The gated delta rule for one chunk of one value head, forward and backward in float32.
//
// With D_ij = exp(G_i - G_j), A_ij = beta_i k_i.k_j D_ij for j < i and S the entering state:
//   Vn = (I + A)^-1 beta (V - exp(G) K S)        what the tokens write
//   O  = exp(G) Q S + P Vn                       P_ij = q_i.k_j D_ij for j <= i
//   S' = exp(G_C) S + K^T (exp(G_C - G) Vn)
// Backward from dO and dS', with dX = (I + A)^-T dVn:
//   dVn = P^T dO + exp(G_C - G) K dS'            dV = beta dX
//   dP  = (dO Vn^T) D                            dM = -beta (dX Vn^T) D below the diagonal
//   dQ  = dP K + exp(G) dO S^T
//   dK  = dM K - exp(G) dV S^T                   as a row of A ("erase")
//       + dM^T K + dP^T Q + exp(G_C - G) Vn dS'^T   as a column ("write")
//   dS  = exp(G_C) dS' + Q^T exp(G) dO - K^T exp(G) dV
//   dG_i = q_i.dQ_i + k_i.(erase_i - write_i), and dG_C += <dS', S'>: every occurrence of G_i
// scales the query and the erasing role of row i by exp(G_i), its writing role by exp(-G_i).
#include "float_tiles.h"
#include "training_delta.h"

namespace qnext::QNEXT_ISA {
namespace {

// out[i][j] = a_i . b_j for columns up to the last row of a tile, times `by` entrywise and `factor`
// by row where they are given. bt is [depth][C].
struct Lower {
  const float* a;
  const float* bt;
  float* out;
  int64_t depth, C;
  const float* by;
  const float* factor;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    if (c >= i + R) return;
    Vec acc[R][V];
    clear<R, V>(acc);
    accumulate<R, V, kTail>(a + i * depth, depth, 1, bt + c, C, depth, tail, acc);
    for (int r = 0; r < R; ++r) {
      if (by) {
        const Vec f = Vec::set(factor ? -factor[i + r] : 1.0f);
        Vec d[V];
        load<V, kTail>(by + (i + r) * C + c, tail, d);
        for (int j = 0; j < V; ++j) acc[r][j] = f * d[j] * acc[r][j];
      }
      store<V, kTail>(acc[r], out + (i + r) * C + c, tail);
    }
  }
};

// entry Q S into out.
struct Queries {
  const KeyHead& x;
  const Decays& y;
  const float* state;
  float* out;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    Vec acc[R][V];
    clear<R, V>(acc);
    accumulate<R, V, kTail>(x.q + i * x.K, x.K, 1, state + c, x.M, x.K, tail, acc);
    for (int r = 0; r < R; ++r) {
      const Vec entry = Vec::set(y.entry[i + r]);
      for (int j = 0; j < V; ++j) acc[r][j] = entry * acc[r][j];
      store<V, kTail>(acc[r], out + (i + r) * x.M + c, tail);
    }
  }
};

// R rows of what is written, from those before; then what their queries read of it.
struct Written {
  const KeyHead& x;
  const Decays& y;
  const float* state;
  const float* v;
  float* written;
  float* out;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const int64_t M = x.M, C = x.C;
    Vec d[R][V];
    clear<R, V>(d);
    accumulate<R, V, kTail>(x.k + i * x.K, x.K, 1, state + c, M, x.K, tail, d);
    for (int r = 0; r < R; ++r) {
      const Vec entry = Vec::set(y.entry[i + r]), beta = Vec::set(y.beta[i + r]);
      Vec value[V];
      load<V, kTail>(v + (i + r) * M + c, tail, value);
      for (int j = 0; j < V; ++j) d[r][j] = beta * (value[j] - entry * d[r][j]);
    }
    accumulate<R, V, kTail>(y.solve + i * C, C, 1, written + c, M, i, tail, d);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < r; ++n) {
        const Vec by = Vec::set(y.solve[(i + r) * C + i + n]);
        for (int j = 0; j < V; ++j) d[r][j] = fma(by, d[n][j], d[r][j]);
      }
      store<V, kTail>(d[r], written + (i + r) * M + c, tail);
    }
    Vec read[R][V];
    for (int r = 0; r < R; ++r) load<V, kTail>(out + (i + r) * M + c, tail, read[r]);
    accumulate<R, V, kTail>(y.read + i * C, C, 1, written + c, M, i, tail, read);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n <= r; ++n) {
        const Vec by = Vec::set(y.read[(i + r) * C + i + n]);
        for (int j = 0; j < V; ++j) read[r][j] = fma(by, d[n][j], read[r][j]);
      }
      store<V, kTail>(read[r], out + (i + r) * M + c, tail);
    }
  }
};

// R rows of to = carry from + a^T first [+ b^T second], a and b [tokens][K].
struct States {
  const KeyHead& x;
  float carry;
  const float* from;
  float* to;
  const float* a;
  const float* first;
  const float* b;
  const float* second;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const Vec by = Vec::set(carry);
    Vec acc[R][V];
    for (int r = 0; r < R; ++r) {
      load<V, kTail>(from + (i + r) * x.M + c, tail, acc[r]);
      for (int j = 0; j < V; ++j) acc[r][j] = by * acc[r][j];
    }
    accumulate<R, V, kTail>(a + i, 1, x.K, first + c, x.M, x.tokens, tail, acc);
    if (b) accumulate<R, V, kTail>(b + i, 1, x.K, second + c, x.M, x.tokens, tail, acc);
    for (int r = 0; r < R; ++r) store<V, kTail>(acc[r], to + (i + r) * x.M + c, tail);
  }
};

// dX from the last row to the first: P^T dO + exit K dS', then the transposed substitution.
struct Solved {
  const KeyHead& x;
  const Decays& y;
  const float* d_state;
  const float* d_out;
  float* d_x;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const int64_t M = x.M, C = x.C, T = x.tokens;
    Vec acc[R][V];
    clear<R, V>(acc);
    accumulate<R, V, kTail>(x.k + i * x.K, x.K, 1, d_state + c, M, x.K, tail, acc);
    for (int r = 0; r < R; ++r) {
      const Vec exit = Vec::set(y.exit[i + r]);
      for (int j = 0; j < V; ++j) acc[r][j] = exit * acc[r][j];
    }
    accumulate<R, V, kTail>(y.read + i * C + i, 1, C, d_out + i * M + c, M, T - i, tail, acc);
    accumulate<R, V, kTail>(y.solve + (i + R) * C + i, 1, C, d_x + (i + R) * M + c, M, T - i - R,
                            tail, acc);
    for (int r = R - 1; r >= 0; --r) {
      for (int n = r + 1; n < R; ++n) {
        const Vec by = Vec::set(y.solve[(i + n) * C + i + r]);
        for (int j = 0; j < V; ++j) acc[r][j] = fma(by, acc[n][j], acc[r][j]);
      }
      store<V, kTail>(acc[r], d_x + (i + r) * M + c, tail);
    }
  }
};

// left state^T + lower k: the query's gradient, and that of the erasing key.
struct Rows {
  const KeyHead& x;
  const float* left;     // [tokens][M]
  const float* state_t;  // [M][K]
  const float* lower;    // [tokens][C], 0 above the diagonal
  float* out;            // [tokens][K]
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    Vec acc[R][V];
    clear<R, V>(acc);
    accumulate<R, V, kTail>(left + i * x.M, x.M, 1, state_t + c, x.K, x.M, tail, acc);
    accumulate<R, V, kTail>(lower + i * x.C, x.C, 1, x.k + c, x.K, i + R, tail, acc);
    for (int r = 0; r < R; ++r) store<V, kTail>(acc[r], out + (i + r) * x.K + c, tail);
  }
};

// exit written dS'^T + dM^T k + dP^T q: the gradient of the writing key. `kept` gets the sum of the
// first term times k.
struct Columns {
  const KeyHead& x;
  const Decays& y;
  const float* written;
  const float* d_state_t;  // [M][K]
  const float* d_m;        // [tokens][C]
  const float* d_p;
  float* out;
  Vec* kept;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const int64_t K = x.K, C = x.C, T = x.tokens;
    Vec acc[R][V];
    clear<R, V>(acc);
    accumulate<R, V, kTail>(written + i * x.M, x.M, 1, d_state_t + c, K, x.M, tail, acc);
    Vec sum = *kept;
    for (int r = 0; r < R; ++r) {
      const Vec exit = Vec::set(y.exit[i + r]);
      Vec key[V];
      load<V, kTail>(x.k + (i + r) * K + c, tail, key);
      for (int j = 0; j < V; ++j) {
        acc[r][j] = exit * acc[r][j];
        sum = fma(acc[r][j], key[j], sum);
      }
    }
    *kept = sum;
    accumulate<R, V, kTail>(d_m + i * C + i, 1, C, x.k + i * K + c, K, T - i, tail, acc);
    accumulate<R, V, kTail>(d_p + i * C + i, 1, C, x.q + i * K + c, K, T - i, tail, acc);
    for (int r = 0; r < R; ++r) store<V, kTail>(acc[r], out + (i + r) * K + c, tail);
  }
};

void turn_floats(const float* from, int64_t rows, int64_t columns, float* to, int64_t stride) {
  turn(reinterpret_cast<const Lane*>(from), columns, rows, columns, reinterpret_cast<Lane*>(to),
       stride);
}

// to = by[i] * from, row by row.
void scale_rows(const float* from, const float* by, float sign, int64_t rows, int64_t columns,
                float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vec factor = Vec::set(sign * by[i]);
    for (int64_t c = 0; c < columns; c += Vec::width) {
      const int64_t n = columns - c;
      store_some(factor * load_some(from + i * columns + c, n), to + i * columns + c, n);
    }
  }
}

float dot(const float* a, const float* b, int64_t count) {
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < count; i += Vec::width) {
    sum = fma(load_some(a + i, count - i), load_some(b + i, count - i), sum);
  }
  return sum.sum();
}

}  // namespace

void key_products(const KeyHead& x) {
  turn_floats(x.k, x.tokens, x.K, x.kt, x.C);
  cover<2>(Lower{x.k, x.kt, x.kk, x.K, x.C, nullptr, nullptr}, x.tokens, x.tokens);
  cover<2>(Lower{x.q, x.kt, x.qk, x.K, x.C, nullptr, nullptr}, x.tokens, x.tokens);
}

void decays(const KeyHead& x, const Decays& y) {
  const int64_t T = x.tokens, C = x.C;
  double sum = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    sum += static_cast<double>(y.g[t]);
    y.sum[t] = static_cast<float>(sum);
    y.rest[t] = static_cast<float>(sum - static_cast<double>(y.sum[t]));
  }
  for (int64_t t = T; t < C; ++t) y.sum[t] = y.rest[t] = 0.0f;
  const Vec last = Vec::set(y.sum[T - 1]), last_rest = Vec::set(y.rest[T - 1]);
  for (int64_t t = 0; t < T; t += Vec::width) {
    const Vec at = Vec::load(y.sum + t), rest = Vec::load(y.rest + t);
    exp(at).store(y.entry + t);
    exp((last - at) + (last_rest - rest)).store(y.exit + t);
  }
  for (int64_t i = 0; i < T; ++i) {
    const Vec at = Vec::set(y.sum[i]), rest = Vec::set(y.rest[i]);
    const Vec minus_beta = Vec::set(-y.beta[i]);
    float* decay = y.decay + i * C;
    float* solve = y.solve + i * C;
    float* read = y.read + i * C;
    for (int64_t j = 0; j <= i; j += Vec::width) {
      const Vec d = exp((at - Vec::load(y.sum + j)) + (rest - Vec::load(y.rest + j)));
      d.store(decay + j);
      (minus_beta * d * Vec::load(x.kk + i * C + j)).store(solve + j);
      (d * Vec::load(x.qk + i * C + j)).store(read + j);
    }
    // What lies above the diagonal of a tile is multiplied too.
    solve[i] = 0.0f;
    const size_t above = static_cast<size_t>(C - i - 1) * sizeof(float);
    memset(decay + i + 1, 0, above);
    memset(solve + i + 1, 0, above);
    memset(read + i + 1, 0, above);
  }
}

void core_forward(const KeyHead& x, const Decays& y, const float* state, const float* v,
                  float* written, float* out, float* next, float* scaled) {
  cover<kVectors>(Queries{x, y, state, out}, x.tokens, x.M);
  cover<kVectors>(Written{x, y, state, v, written, out}, x.tokens, x.M);
  if (!next) return;
  scale_rows(written, y.exit, 1.0f, x.tokens, x.M, scaled);
  cover<kVectors>(
      States{x, y.entry[x.tokens - 1], state, next, x.k, scaled, nullptr, nullptr}, x.K, x.M);
}

int64_t core_work(int64_t C, int64_t K, int64_t M) {
  return C * M * 4 + M * C + 2 * C * C + 2 * M * K + 3 * C * K;
}

void core_backward(const KeyHead& x, const Decays& y, const CoreGradients& z) {
  const int64_t T = x.tokens, C = x.C, K = x.K, M = x.M;
  float* d_x = z.work;                  // [C][M]
  float* read_out = d_x + C * M;        // [C][M], exp(G) dO
  float* read_v = read_out + C * M;     // [C][M], -exp(G) dV
  float* written_t = read_v + C * M;    // [M][C]
  float* d_p = written_t + M * C;       // [C][C]
  float* d_m = d_p + C * C;             // [C][C]
  float* state_t = d_m + C * C;         // [M][K]
  float* d_state_t = state_t + M * K;   // [M][K]
  float* d_query = d_state_t + M * K;   // [C][K]
  float* erase = d_query + C * K;       // [C][K]
  float* write = erase + C * K;         // [C][K]
  const float carry = y.entry[T - 1];

  cover_up<kVectors>(Solved{x, y, z.d_state, z.d_out, d_x}, T, M);
  turn_floats(z.written, T, M, written_t, C);
  turn_floats(z.state, K, M, state_t, K);
  turn_floats(z.d_state, K, M, d_state_t, K);
  cover<2>(Lower{z.d_out, written_t, d_p, M, C, y.decay, nullptr}, T, T);
  cover<2>(Lower{d_x, written_t, d_m, M, C, y.decay, y.beta}, T, T);
  for (int64_t i = 0; i < T; ++i) d_m[i * C + i] = 0.0f;
  scale_rows(d_x, y.beta, 1.0f, T, M, z.d_v);
  scale_rows(z.d_v, y.entry, -1.0f, T, M, read_v);
  scale_rows(z.d_out, y.entry, 1.0f, T, M, read_out);
  cover<kVectors>(Rows{x, read_out, state_t, d_p, d_query}, T, K);
  cover<kVectors>(Rows{x, read_v, state_t, d_m, erase}, T, K);
  Vec kept = Vec::zero();
  cover<kVectors>(Columns{x, y, z.written, d_state_t, d_m, d_p, write, &kept}, T, K);
  const float total = carry * dot(z.d_state, z.state, K * M) + kept.sum();
  cover<kVectors>(States{x, carry, z.d_state, z.d_state, x.q, read_out, x.k, read_v}, K, M);

  // Rows from the last to the first: the gradient of g is the sum of all later ones of G.
  double later = static_cast<double>(total);
  for (int64_t i = T - 1; i >= 0; --i) {
    Vec along = Vec::zero();
    for (int64_t c = 0; c < K; c += Vec::width) {
      const int64_t n = K - c, at = i * K + c;
      const Vec dq = load_some(d_query + at, n);
      const Vec e = load_some(erase + at, n), w = load_some(write + at, n);
      along = fma(load_some(x.q + at, n), dq, along);
      along = fma(load_some(x.k + at, n), e - w, along);
      store_some(load_some(z.d_q + at, n) + dq, z.d_q + at, n);
      store_some(load_some(z.d_k + at, n) + e + w, z.d_k + at, n);
    }
    later += static_cast<double>(along.sum());
    z.d_g[i] = static_cast<float>(later);
    z.d_b[i] = dot(d_x + i * M, z.written + i * M, M) * (1.0f - y.beta[i]);
  }
}

}  // namespace qnext::QNEXT_ISA
