// The gated delta rule for up to 64 tokens at once (chunked form: Yang et al. 2024, arXiv
// 2412.06464).
//
// With G the running sum of g inside the chunk and S the state before it, the corrections D of all
// tokens solve a triangular system whose right side needs S only through K S:
//   (I + L) D = beta (V - exp(G) K S),   L_ij = beta_i exp(G_i - G_j) k_i.k_j for j < i
//   O = exp(G) Q S + A D,                A_ij = exp(G_i - G_j) q_i.k_j        for j <= i
//   S' = exp(G_last) S + K^T (exp(G_last - G) D)
// Every sum runs over its terms in rising order and only over terms that exist, so a token's result
// does not depend on how many follow it. Products are register tiles (float_tiles.h).
#include "float_tiles.h"
#include "gated_delta_item.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t C = kDeltaChunk;
// The matrices of a chunk, in the block's work memory.
struct Matrices {
  float* kt;     // [K][C], keys across
  float* kk;     // [C][C], k_i.k_j
  float* qk;     // [C][C], q_i.k_j
  float* solve;  // [C][C], -L
  float* read;   // [C][C], A
  float* sum;    // [C], G rounded to float
  float* rest;   // [C], and what the rounding left
  float* entry;  // [C], exp(G)
  float* exit;   // [C], exp(G_last - G)
};

Matrices carve(float* work, int64_t K) {
  Matrices m;
  m.kt = work;
  m.kk = m.kt + K * C;
  m.qk = m.kk + C * C;
  m.solve = m.qk + C * C;
  m.read = m.solve + C * C;
  m.sum = m.read + C * C;
  m.rest = m.sum + C;
  m.entry = m.rest + C;
  m.exit = m.entry + C;
  return m;
}

// What the parts of a chunk work on.
struct Chunk {
  const DeltaBlock& block;
  const Matrices& m;
  float* state;        // [K][M]
  const float* v;      // [C][M]
  const float* beta;   // [C]
  float* d;            // [C][M]
  float* out;          // [C][M]
  float carry;         // exp(G_last)
};

// Each part is a struct whose `run` does R rows from row i of V vectors of columns from column c.

// out[i][j] = a_i . b_j for columns up to the last row of the tile: the rest is never looked at.
struct Triangle {
  const float* a;
  const float* kt;
  float* out;
  int64_t K;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    if (c >= i + R) return;
    Vec acc[R][V];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < V; ++j) acc[r][j] = Vec::zero();
    }
    accumulate<R, V, kTail>(a + i * K, K, 1, kt + c, C, K, tail, acc);
    for (int r = 0; r < R; ++r) store<V, kTail>(acc[r], out + (i + r) * C + c, tail);
  }
};

// The right side beta (v - exp(G) k S) into d.
struct Keys {
  const Chunk& x;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const int64_t K = x.block.key_dim, M = x.block.value_dim;
    Vec acc[R][V];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < V; ++j) acc[r][j] = Vec::zero();
    }
    accumulate<R, V, kTail>(x.block.k + i * K, K, 1, x.state + c, M, K, tail, acc);
    for (int r = 0; r < R; ++r) {
      const Vec entry = Vec::set(x.m.entry[i + r]), beta = Vec::set(x.beta[i + r]);
      Vec v[V];
      load<V, kTail>(x.v + (i + r) * M + c, tail, v);
      for (int j = 0; j < V; ++j) v[j] = beta * (v[j] - entry * acc[r][j]);
      store<V, kTail>(v, x.d + (i + r) * M + c, tail);
    }
  }
};

// exp(G) q S into out.
struct Queries {
  const Chunk& x;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const int64_t K = x.block.key_dim, M = x.block.value_dim;
    Vec acc[R][V];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < V; ++j) acc[r][j] = Vec::zero();
    }
    accumulate<R, V, kTail>(x.block.q + i * K, K, 1, x.state + c, M, K, tail, acc);
    for (int r = 0; r < R; ++r) {
      const Vec entry = Vec::set(x.m.entry[i + r]);
      for (int j = 0; j < V; ++j) acc[r][j] = entry * acc[r][j];
      store<V, kTail>(acc[r], x.out + (i + r) * M + c, tail);
    }
  }
};

// Forward substitution of R rows of d, then their share of A D: rows before i are solved already.
struct Solve {
  const Chunk& x;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const int64_t M = x.block.value_dim;
    Vec d[R][V];
    for (int r = 0; r < R; ++r) load<V, kTail>(x.d + (i + r) * M + c, tail, d[r]);
    accumulate<R, V, kTail>(x.m.solve + i * C, C, 1, x.d + c, M, i, tail, d);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < r; ++n) {
        const Vec by = Vec::set(x.m.solve[(i + r) * C + i + n]);
        for (int j = 0; j < V; ++j) d[r][j] = fma(by, d[n][j], d[r][j]);
      }
      store<V, kTail>(d[r], x.d + (i + r) * M + c, tail);
    }
    Vec out[R][V];
    for (int r = 0; r < R; ++r) load<V, kTail>(x.out + (i + r) * M + c, tail, out[r]);
    accumulate<R, V, kTail>(x.m.read + i * C, C, 1, x.d + c, M, i, tail, out);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n <= r; ++n) {
        const Vec by = Vec::set(x.m.read[(i + r) * C + i + n]);
        for (int j = 0; j < V; ++j) out[r][j] = fma(by, d[n][j], out[r][j]);
      }
      store<V, kTail>(out[r], x.out + (i + r) * M + c, tail);
    }
  }
};

// R rows of the new state; d is scaled by exp(G_last - G) already.
struct Update {
  const Chunk& x;
  template <int R, int V, bool kTail>
  void run(int64_t i, int64_t c, int tail) const {
    const int64_t K = x.block.key_dim, M = x.block.value_dim;
    const Vec carry = Vec::set(x.carry);
    Vec acc[R][V];
    for (int r = 0; r < R; ++r) {
      load<V, kTail>(x.state + (i + r) * M + c, tail, acc[r]);
      for (int j = 0; j < V; ++j) acc[r][j] = carry * acc[r][j];
    }
    accumulate<R, V, kTail>(x.block.k + i, 1, K, x.d + c, M, x.block.tokens, tail, acc);
    for (int r = 0; r < R; ++r) store<V, kTail>(acc[r], x.state + (i + r) * M + c, tail);
  }
};

void transpose(const float* k, int64_t tokens, int64_t K, float* kt) {
  int64_t t = 0;
#if !defined(QNEXT_ISA_scalar)
  for (; t + 4 <= tokens; t += 4) {
    int64_t i = 0;
    for (; i + 4 <= K; i += 4) {
      __m128 row[4];
      for (int n = 0; n < 4; ++n) row[n] = _mm_loadu_ps(k + (t + n) * K + i);
      _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
      for (int n = 0; n < 4; ++n) _mm_storeu_ps(kt + (i + n) * C + t, row[n]);
    }
    for (; i < K; ++i) {
      for (int n = 0; n < 4; ++n) kt[i * C + t + n] = k[(t + n) * K + i];
    }
  }
#endif
  for (; t < tokens; ++t) {
    for (int64_t i = 0; i < K; ++i) kt[i * C + t] = k[t * K + i];
  }
}

// The running sum in double, kept as two floats: differences of it go into exponentials.
void sum_decays(const DeltaBlock& block, int64_t w, const Matrices& m) {
  const float* g = block.g + w * C;
  double sum = 0.0;
  for (int64_t t = 0; t < block.tokens; ++t) {
    sum += static_cast<double>(g[t]);
    m.sum[t] = static_cast<float>(sum);
    m.rest[t] = static_cast<float>(sum - static_cast<double>(m.sum[t]));
  }
}

// Vectors may run past the last token: the arrays are C long, and what is there is not used.
static_assert(C % 16 == 0);

void decay_matrices(const DeltaBlock& block, int64_t w, const Matrices& m) {
  const float* beta = block.beta + w * C;
  const int64_t T = block.tokens;
  const Vec last = Vec::set(m.sum[T - 1]), last_rest = Vec::set(m.rest[T - 1]);
  for (int64_t t = 0; t < T; t += Vec::width) {
    const Vec sum = Vec::load(m.sum + t), rest = Vec::load(m.rest + t);
    exp(sum).store(m.entry + t);
    exp((last - sum) + (last_rest - rest)).store(m.exit + t);
  }
  for (int64_t i = 0; i < T; ++i) {
    const Vec sum = Vec::set(m.sum[i]), rest = Vec::set(m.rest[i]);
    const Vec minus_beta = Vec::set(-beta[i]);
    for (int64_t j = 0; j <= i; j += Vec::width) {
      const Vec decay =
          exp((sum - Vec::load(m.sum + j)) + (rest - Vec::load(m.rest + j)));
      (minus_beta * decay * Vec::load(m.kk + i * C + j)).store(m.solve + i * C + j);
      (decay * Vec::load(m.qk + i * C + j)).store(m.read + i * C + j);
    }
  }
}

void scale_rows(const float* by, int64_t rows, int64_t columns, float* x) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vec factor = Vec::set(by[i]);
    float* row = x + i * columns;
    int64_t c = 0;
    for (; c + Vec::width <= columns; c += Vec::width) (factor * Vec::load(row + c)).store(row + c);
    if (c < columns) {
      const int tail = static_cast<int>(columns - c);
      (factor * Vec::load(row + c, tail)).store(row + c, tail);
    }
  }
}

}  // namespace

int64_t delta_chunk_work(const DeltaShape& shape) {
  return shape.key_dim * C + 4 * C * C + 4 * C;
}

void delta_chunk(const DeltaBlock& block, int64_t w, float* state, bool products) {
  const Matrices m = carve(block.work, block.key_dim);
  const int64_t T = block.tokens, K = block.key_dim, M = block.value_dim;
  if (products) {
    // Narrow panels: those that lie above the diagonal are left out.
    transpose(block.k, T, K, m.kt);
    cover<2>(Triangle{block.k, m.kt, m.kk, K}, T, T);
    cover<2>(Triangle{block.q, m.kt, m.qk, K}, T, T);
  }
  sum_decays(block, w, m);
  decay_matrices(block, w, m);
  const int64_t at = w * C * M;
  const Chunk x = {block, m, state, block.v + at, block.beta + w * C, block.d + at, block.out + at,
                   m.entry[T - 1]};
  cover<kVectors>(Keys{x}, T, M);
  cover<kVectors>(Queries{x}, T, M);
  cover<kVectors>(Solve{x}, T, M);
  scale_rows(m.exit, T, M, x.d);
  cover<kVectors>(Update{x}, K, M);
}

}  // namespace qnext::QNEXT_ISA
