// The core of the gated delta rule for training: one chunk of one value head, both ways.
#pragma once

#include "packed_product.h"
#include "training.h"

namespace qnext::QNEXT_ISA {

bool delta_forward(const DeltaLayerCall& call);
bool delta_backward(const DeltaLayerCall& call);

// What a chunk's value heads share, made from its queries and keys.
struct KeyHead {
  int64_t tokens, C, K, M;  // C: leading dimension of the square arrays, a multiple of 16
  float* q;                 // [tokens][K], unit length times K^-0.5
  float* k;                 // [tokens][K], unit length
  float* kt;                // [K][C], keys across
  float* kk;                // [tokens][C], k_i.k_j for j <= i
  float* qk;                // [tokens][C], q_i.k_j for j <= i
};

// What belongs to one value head; `g` and `beta` are given, the rest `decays` makes.
struct Decays {
  const float* g;     // [tokens], logarithm of the decay
  const float* beta;  // [tokens]
  float* sum;         // [C], G: running sum of g, as two floats
  float* rest;        // [C]
  float* entry;       // [C], exp(G)
  float* exit;        // [C], exp(G_last - G)
  float* decay;       // [tokens][C], exp(G_i - G_j) for j <= i, else 0
  float* solve;       // [tokens][C], -beta_i decay_ij kk_ij for j < i, else 0
  float* read;        // [tokens][C], decay_ij qk_ij for j <= i, else 0
};

// kt, kk and qk.
void key_products(const KeyHead& x);

void decays(const KeyHead& x, const Decays& y);

// written = (I - solve)^-1 beta (v - entry K S), out = entry Q S + read written and, unless `next`
// is null, next = exp(G_last) S + K^T (exit written). `scaled` is scratch, [tokens][M].
void core_forward(const KeyHead& x, const Decays& y, const float* state, const float* v,
                  float* written, float* out, float* next, float* scaled);

// Gradients of one value head's chunk.
struct CoreGradients {
  const float* state;    // [K][M], entering
  const float* written;  // [tokens][M]
  const float* d_out;    // [tokens][M]
  float* d_state;        // [K][M], of the leaving state; becomes that of the entering one
  float* d_q;            // [tokens][K], of the unit queries: added
  float* d_k;            // [tokens][K], of the unit keys: added
  float* d_v;            // [tokens][M]
  float* d_g;            // [tokens]
  float* d_b;            // [tokens], of what the sigmoid makes beta of
  float* work;           // core_work(...) floats
};

int64_t core_work(int64_t C, int64_t K, int64_t M);
void core_backward(const KeyHead& x, const Decays& y, const CoreGradients& z);

}  // namespace qnext::QNEXT_ISA
