// Routed experts, forward and backward: one expert after the other, its rows gathered where they
// stand. What the slots of a token add is summed in float32, experts in rising order.
#include "training_experts.h"

#include "packed_product.h"
#include "training_memory.h"

namespace qnext::QNEXT_ISA {
namespace {

int64_t most_rows(const ExpertsCall& c) {
  int64_t most = 0;
  for (int64_t e = 0; e < c.experts; ++e) {
    const int64_t rows = c.starts[e + 1] - c.starts[e];
    most = rows > most ? rows : most;
  }
  return most;
}

// weight * silu(gate) * up of one row, rounded to T.
template <class T>
void activate(const T* before, float weight, int64_t inner, T* out) {
  const Vec by = Vec::set(weight);
  for (int64_t f = 0; f < inner; f += Vec::width) {
    const int64_t n = inner - f;
    const Vec opened = silu(load_some(before + f, n));
    store_some(opened * load_some(before + inner + f, n) * by, out + f, n);
  }
}

// From the gradient of the activation of one row: those of what came before it, and of the weight.
template <class T>
float through_activation(const T* before, float weight, const float* d_scaled, int64_t inner,
                         T* d_before, T* scaled) {
  const Vec by = Vec::set(weight), one = Vec::set(1.0f);
  Vec along = Vec::zero();
  for (int64_t f = 0; f < inner; f += Vec::width) {
    const int64_t n = inner - f;
    const Vec gate = load_some(before + f, n), up = load_some(before + inner + f, n);
    const Vec d = load_some(d_scaled + f, n);
    const Vec open = sigmoid(gate), opened = gate * open;
    along = fma(d * up, opened, along);
    store_some(opened * up * by, scaled + f, n);
    const Vec slope = open * fma(gate, one - open, one);
    store_some(d * up * by * slope, d_before + f, n);
    store_some(opened * d * by, d_before + inner + f, n);
  }
  return along.sum();
}

template <class T>
const Lane* lanes(const T* p) {
  return reinterpret_cast<const Lane*>(p);
}

// Rounds the float32 sums of all tokens.
template <class T>
void round_all(const float* from, int64_t count, void* to) {
  T* out = static_cast<T*>(to);
  for (int64_t i = 0; i < count; i += Vec::width) {
    store_some(load_some(from + i, count - i), out + i, count - i);
  }
}

template <class T>
bool forward(const ExpertsCall& c) {
  const int64_t D = c.width, F = c.inner, most = most_rows(c);
  const int64_t wide = packed_lanes<T>(2 * F, D), narrow = packed_lanes<T>(D, F);
  Memory memory;
  float* sums = memory.take<float>(c.tokens * D);
  Lane* packed = memory.take<Lane>(wide > narrow ? wide : narrow);
  T* scaled = memory.take<T>(most * F);
  const Lane** left = memory.take<const Lane*>(most);
  void** out = memory.take<void*>(most);
  if (!memory.obtain()) return false;
  memory.place(&sums, &packed, &scaled, &left, &out);
  memset(sums, 0, static_cast<size_t>(c.tokens * D) * sizeof(float));
  for (int64_t e = 0; e < c.experts; ++e) {
    const int32_t* slots = c.order + c.starts[e];
    const int64_t rows = c.starts[e + 1] - c.starts[e];
    if (!rows) continue;
    T* before = static_cast<T*>(c.before) + c.starts[e] * 2 * F;
    for (int64_t i = 0; i < rows; ++i) {
      left[i] = lanes(static_cast<const T*>(c.h) + slots[i] / c.slots * D);
      out[i] = before + i * 2 * F;
    }
    pack_columns(static_cast<const T*>(c.gate_up) + e * 2 * F * D, 2 * F, D, D, packed);
    product<T>({left, 1}, packed, D / kPerLane<T>, rows, 2 * F, out, Put::round);
    for (int64_t i = 0; i < rows; ++i) {
      activate(before + i * 2 * F, c.weights[slots[i]], F, scaled + i * F);
      left[i] = lanes(scaled + i * F);
      out[i] = sums + slots[i] / c.slots * D;
    }
    pack_columns(static_cast<const T*>(c.down) + e * D * F, D, F, F, packed);
    product<T>({left, 1}, packed, F / kPerLane<T>, rows, D, out, Put::add);
  }
  round_all<T>(sums, c.tokens * D, c.y);
  return true;
}

template <class T>
bool backward(const ExpertsCall& c) {
  const int64_t D = c.width, F = c.inner, most = most_rows(c), half = lanes_of<T>(most);
  const int64_t both = 2 * F > D ? 2 * F : D;
  int64_t room = packed_lanes<T>(D, most);
  const int64_t others[] = {packed_lanes<T>(F, D), packed_lanes<T>(F, most),
                            packed_lanes<T>(D, 2 * F)};
  for (const int64_t other : others) room = other > room ? other : room;
  Memory memory;
  float* sums = memory.take<float>(c.tokens * D);
  Lane* packed = memory.take<Lane>(room);
  Lane* turned = memory.take<Lane>(half * both);
  float* d_scaled = memory.take<float>(most * F);
  T* scaled = memory.take<T>(most * F);
  T* d_before = memory.take<T>(most * 2 * F);
  const int64_t pointers = most > both ? most : both;
  const T** rows_of = memory.take<const T*>(pointers);
  const Lane** left = memory.take<const Lane*>(pointers);
  void** out = memory.take<void*>(pointers);
  if (!memory.obtain()) return false;
  memory.place(&sums, &packed, &turned, &d_scaled, &scaled, &d_before, &rows_of, &left, &out);
  memset(sums, 0, static_cast<size_t>(c.tokens * D) * sizeof(float));
  for (int64_t e = 0; e < c.experts; ++e) {
    const int32_t* slots = c.order + c.starts[e];
    const int64_t rows = c.starts[e + 1] - c.starts[e];
    T* d_gate_up = static_cast<T*>(c.d_gate_up) + e * 2 * F * D;
    T* d_down = static_cast<T*>(c.d_down) + e * D * F;
    if (!rows) {
      memset(d_gate_up, 0, static_cast<size_t>(2 * F * D) * sizeof(T));
      memset(d_down, 0, static_cast<size_t>(D * F) * sizeof(T));
      continue;
    }
    const T* before = static_cast<const T*>(c.before) + c.starts[e] * 2 * F;
    const T* gate_up = static_cast<const T*>(c.gate_up) + e * 2 * F * D;
    const T* down = static_cast<const T*>(c.down) + e * D * F;
    const int64_t depth = lanes_of<T>(rows);
    // d_scaled = d_y down
    for (int64_t d = 0; d < D; ++d) rows_of[d] = down + d * F;
    pack_rows(rows_of, D, F, kPanel, packed);
    for (int64_t i = 0; i < rows; ++i) {
      rows_of[i] = static_cast<const T*>(c.d_y) + slots[i] / c.slots * D;
      left[i] = lanes(rows_of[i]);
      out[i] = d_scaled + i * F;
    }
    product<T>({left, 1}, packed, D / kPerLane<T>, rows, F, out, Put::set);
    for (int64_t i = 0; i < rows; ++i) {
      c.d_weights[slots[i]] =
          through_activation(before + i * 2 * F, c.weights[slots[i]], d_scaled + i * F, F,
                             d_before + i * 2 * F, scaled + i * F);
    }
    // d_down = d_y^T scaled
    pack_rows(rows_of, rows, D, D, turned);
    for (int64_t i = 0; i < rows; ++i) rows_of[i] = scaled + i * F;
    pack_rows(rows_of, rows, F, kPanel, packed);
    for (int64_t d = 0; d < D; ++d) {
      left[d] = turned + d;
      out[d] = d_down + d * F;
    }
    product<T>({left, D}, packed, depth, D, F, out, Put::round);
    // d_gate_up = d_before^T h
    for (int64_t i = 0; i < rows; ++i) rows_of[i] = d_before + i * 2 * F;
    pack_rows(rows_of, rows, 2 * F, 2 * F, turned);
    for (int64_t i = 0; i < rows; ++i) {
      rows_of[i] = static_cast<const T*>(c.h) + slots[i] / c.slots * D;
    }
    pack_rows(rows_of, rows, D, kPanel, packed);
    for (int64_t f = 0; f < 2 * F; ++f) {
      left[f] = turned + f;
      out[f] = d_gate_up + f * D;
    }
    product<T>({left, 2 * F}, packed, depth, 2 * F, D, out, Put::round);
    // d_h += d_before gate_up
    for (int64_t f = 0; f < 2 * F; ++f) rows_of[f] = gate_up + f * D;
    pack_rows(rows_of, 2 * F, D, kPanel, packed);
    for (int64_t i = 0; i < rows; ++i) {
      left[i] = lanes(d_before + i * 2 * F);
      out[i] = sums + slots[i] / c.slots * D;
    }
    product<T>({left, 1}, packed, 2 * F / kPerLane<T>, rows, D, out, Put::add);
  }
  round_all<T>(sums, c.tokens * D, c.d_h);
  return true;
}

}  // namespace

bool experts_forward(const ExpertsCall& call) {
  return call.number == Number::f32 ? forward<float>(call) : forward<bf16>(call);
}

bool experts_backward(const ExpertsCall& call) {
  return call.number == Number::f32 ? backward<float>(call) : backward<bf16>(call);
}

}  // namespace qnext::QNEXT_ISA
