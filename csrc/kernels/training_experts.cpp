// Experts, forward and backward: one after the other, its rows gathered where they stand, a block of
// them at a time. What experts add to a token is summed in float32: the shared one first, then the
// routed ones in rising order.
#include "training_experts.h"

#include "packed_product.h"
#include "training_memory.h"

namespace qnext::QNEXT_ISA {
namespace {

// Rows whose intermediate results fit into a core's cache beside the weights of an expert.
constexpr int64_t kBlock = 256;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One expert with its rows. Row i is slot slots[i], or token i of all where there are none.
template <class T>
struct Expert {
  int64_t rows, inner;
  const int32_t* slots;
  int64_t per_token;
  const float* weights;  // by slot
  const T *gate, *up;    // [inner][width]
  const T* down;         // [width][inner]
  T* before;             // [rows][2 inner]
  float* d_weights;
  T *d_gate, *d_up, *d_down;

  int64_t slot(int64_t i) const { return slots ? slots[i] : i; }
  int64_t token(int64_t i) const { return slots ? slots[i] / per_token : i; }
  // Row f of gate and up, one below the other.
  const T* wide(int64_t f, int64_t width) const {
    return f < inner ? gate + f * width : up + (f - inner) * width;
  }
  T* d_wide(int64_t f, int64_t width) const {
    return f < inner ? d_gate + f * width : d_up + (f - inner) * width;
  }
};

template <class T>
Expert<T> routed(const ExpertsCall& c, int64_t e) {
  const int64_t D = c.width, F = c.inner, first = c.starts[e];
  Expert<T> x = {};
  x.rows = c.starts[e + 1] - first;
  x.inner = F;
  x.slots = c.order + first;
  x.per_token = c.slots;
  x.weights = c.weights;
  x.gate = static_cast<const T*>(c.gate_up) + e * 2 * F * D;
  x.up = x.gate + F * D;
  x.down = static_cast<const T*>(c.down) + e * D * F;
  x.before = static_cast<T*>(c.before) + first * 2 * F;
  x.d_weights = c.d_weights;
  if (c.d_gate_up) {
    x.d_gate = static_cast<T*>(c.d_gate_up) + e * 2 * F * D;
    x.d_up = x.d_gate + F * D;
    x.d_down = static_cast<T*>(c.d_down) + e * D * F;
  }
  return x;
}

template <class T>
Expert<T> shared(const ExpertsCall& c) {
  const SharedExpert& s = c.shared;
  Expert<T> x = {};
  x.rows = c.tokens;
  x.inner = s.inner;
  x.weights = s.share;
  x.gate = static_cast<const T*>(s.gate);
  x.up = static_cast<const T*>(s.up);
  x.down = static_cast<const T*>(s.down);
  x.before = static_cast<T*>(s.before);
  x.d_weights = s.d_share;
  x.d_gate = static_cast<T*>(s.d_gate);
  x.d_up = static_cast<T*>(s.d_up);
  x.d_down = static_cast<T*>(s.d_down);
  return x;
}

// Rows of the largest block.
int64_t most_rows(const ExpertsCall& c) {
  int64_t most = c.shared.inner ? c.tokens : 0;
  for (int64_t e = 0; e < c.experts; ++e) most = larger(most, c.starts[e + 1] - c.starts[e]);
  return smaller(most, kBlock);
}

int64_t widest(const ExpertsCall& c) { return larger(c.inner, c.shared.inner); }

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

// from, plus another array if there is one, rounded.
template <class T>
void round_to(const float* from, const T* more, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += Vec::width) {
    const int64_t n = count - i;
    const Vec x = load_some(from + i, n);
    store_some(more ? x + load_some(more + i, n) : x, out + i, n);
  }
}

// Scratch memory of the forward pass.
template <class T>
struct Forward {
  Memory memory;
  Lane *wide, *narrow;  // packed weights
  T *both, *scaled;
  const Lane** left;
  void** out;

  bool obtain(const ExpertsCall& c) {
    const int64_t D = c.width, F = widest(c), most = most_rows(c);
    wide = memory.take<Lane>(packed_lanes<T>(2 * F, D));
    narrow = memory.take<Lane>(packed_lanes<T>(D, F));
    both = memory.take<T>(2 * F * D);
    scaled = memory.take<T>(most * F);
    left = memory.take<const Lane*>(most);
    out = memory.take<void*>(most);
    if (!memory.obtain()) return false;
    memory.place(&wide, &narrow, &both, &scaled, &left, &out);
    return true;
  }

  // `next` is the expert that follows, or null.
  void run(const ExpertsCall& c, const Expert<T>& x, const Expert<T>* next, Put put, float* sums) {
    const int64_t D = c.width, F = x.inner;
    const T* rows = x.gate;
    if (x.up != x.gate + F * D) {
      memcpy(both, x.gate, static_cast<size_t>(F * D) * sizeof(T));
      memcpy(both + F * D, x.up, static_cast<size_t>(F * D) * sizeof(T));
      rows = both;
    }
    pack_columns(rows, 2 * F, D, D, wide);
    pack_columns(x.down, D, F, F, narrow);
    for (int64_t first = 0; first < x.rows; first += kBlock) {
      const int64_t n = smaller(kBlock, x.rows - first);
      T* before = x.before + first * 2 * F;
      for (int64_t i = 0; i < n; ++i) {
        left[i] = lanes(static_cast<const T*>(c.h) + x.token(first + i) * D);
        out[i] = before + i * 2 * F;
      }
      const bool last = first + n == x.rows && next;
      const Ahead wide_next =
          last ? Ahead::of(next->gate, 2 * next->inner * D, tiles_of(n, 2 * F), false) : Ahead();
      product<T>({left, 1}, wide, D / kPerLane<T>, n, 2 * F, out, Put::round, wide_next);
      for (int64_t i = 0; i < n; ++i) {
        activate(before + i * 2 * F, x.weights[x.slot(first + i)], F, scaled + i * F);
        left[i] = lanes(scaled + i * F);
        out[i] = sums + x.token(first + i) * D;
      }
      const Ahead narrow_next =
          last ? Ahead::of(next->down, next->inner * D, tiles_of(n, D), false) : Ahead();
      product<T>({left, 1}, narrow, F / kPerLane<T>, n, D, out, put, narrow_next);
    }
  }
};

// The same of the backward pass.
template <class T>
struct Backward {
  Memory memory;
  Lane *wide, *narrow, *packed, *turned;
  float *d_scaled, *d_sums;
  T *scaled, *d_before;
  const T** rows_of;
  const Lane** left;
  void** out;

  bool obtain(const ExpertsCall& c) {
    const int64_t D = c.width, F = widest(c), most = most_rows(c), half = lanes_of<T>(most);
    const int64_t pointers = larger(larger(most, 2 * F), D);
    wide = memory.take<Lane>(packed_lanes<T>(D, 2 * F));
    narrow = memory.take<Lane>(packed_lanes<T>(F, D));
    packed = memory.take<Lane>(larger(packed_lanes<T>(D, most), packed_lanes<T>(F, most)));
    turned = memory.take<Lane>(half * larger(2 * F, D));
    d_scaled = memory.take<float>(most * F);
    d_sums = memory.take<float>(3 * F * D);
    scaled = memory.take<T>(most * F);
    d_before = memory.take<T>(most * 2 * F);
    rows_of = memory.take<const T*>(pointers);
    left = memory.take<const Lane*>(pointers);
    out = memory.take<void*>(pointers);
    if (!memory.obtain()) return false;
    memory.place(&wide, &narrow, &packed, &turned, &d_scaled, &d_sums, &scaled, &d_before,
                 &rows_of, &left, &out);
    return true;
  }

  void run(const ExpertsCall& c, const Expert<T>& x, const Expert<T>* next, Put put, float* sums) {
    const int64_t D = c.width, F = x.inner;
    for (int64_t d = 0; d < D; ++d) rows_of[d] = x.down + d * F;
    pack_rows(rows_of, D, F, kPanel, narrow);
    for (int64_t f = 0; f < 2 * F; ++f) rows_of[f] = x.wide(f, D);
    pack_rows(rows_of, 2 * F, D, kPanel, wide);
    float* d_down = d_sums + 2 * F * D;
    for (int64_t first = 0; first < x.rows; first += kBlock) {
      const int64_t n = smaller(kBlock, x.rows - first), depth = lanes_of<T>(n);
      // Gradients of weights are rounded once: at once if there are no other blocks.
      const bool only = n == x.rows;
      const Put gradient = only ? Put::round : first ? Put::add : Put::set;
      // d_scaled = d_y down
      for (int64_t i = 0; i < n; ++i) {
        rows_of[i] = static_cast<const T*>(c.d_y) + x.token(first + i) * D;
        left[i] = lanes(rows_of[i]);
        out[i] = d_scaled + i * F;
      }
      const Ahead down_found =
          only ? Ahead::of(x.d_down, F * D, tiles_of(n, F), true) : Ahead();
      product<T>({left, 1}, narrow, D / kPerLane<T>, n, F, out, Put::set, down_found);
      const T* before = x.before + first * 2 * F;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t slot = x.slot(first + i);
        x.d_weights[slot] =
            through_activation(before + i * 2 * F, x.weights[slot], d_scaled + i * F, F,
                               d_before + i * 2 * F, scaled + i * F);
      }
      // d_down = d_y^T scaled
      pack_rows(rows_of, n, D, D, turned);
      for (int64_t i = 0; i < n; ++i) rows_of[i] = scaled + i * F;
      pack_rows(rows_of, n, F, kPanel, packed);
      for (int64_t d = 0; d < D; ++d) {
        left[d] = turned + d;
        out[d] = only ? static_cast<void*>(x.d_down + d * F) : d_down + d * F;
      }
      const Ahead wide_found =
          only && x.slots ? Ahead::of(x.d_gate, 2 * F * D, tiles_of(D, F), true) : Ahead();
      product<T>({left, D}, packed, depth, D, F, out, gradient, wide_found);
      // d_gate, d_up = d_before^T h
      for (int64_t i = 0; i < n; ++i) rows_of[i] = d_before + i * 2 * F;
      pack_rows(rows_of, n, 2 * F, 2 * F, turned);
      for (int64_t i = 0; i < n; ++i) {
        rows_of[i] = static_cast<const T*>(c.h) + x.token(first + i) * D;
      }
      pack_rows(rows_of, n, D, kPanel, packed);
      for (int64_t f = 0; f < 2 * F; ++f) {
        left[f] = turned + f;
        out[f] = only ? static_cast<void*>(x.d_wide(f, D)) : d_sums + f * D;
      }
      const bool last = first + n == x.rows && next;
      const Ahead narrow_next =
          last ? Ahead::of(next->down, next->inner * D, tiles_of(2 * F, D), false) : Ahead();
      product<T>({left, 2 * F}, packed, depth, 2 * F, D, out, gradient, narrow_next);
      // d_h += d_before [gate; up]
      for (int64_t i = 0; i < n; ++i) {
        left[i] = lanes(d_before + i * 2 * F);
        out[i] = sums + x.token(first + i) * D;
      }
      const Ahead wide_next =
          last ? Ahead::of(next->gate, 2 * next->inner * D, tiles_of(n, D), false) : Ahead();
      product<T>({left, 1}, wide, 2 * F / kPerLane<T>, n, D, out, put, wide_next);
    }
    if (x.rows <= kBlock) return;
    round_to<T>(d_sums, nullptr, F * D, x.d_gate);
    round_to<T>(d_sums + F * D, nullptr, F * D, x.d_up);
    round_to<T>(d_down, nullptr, D * F, x.d_down);
  }
};

template <class T, class Pass>
bool all(const ExpertsCall& c, float* sums) {
  const size_t numbers = static_cast<size_t>(c.inner * c.width);
  Pass pass;
  if (!pass.obtain(c)) return false;
  if (c.shared.inner) {
    pass.run(c, shared<T>(c), nullptr, Put::set, sums);
  } else {
    memset(sums, 0, static_cast<size_t>(c.tokens * c.width) * sizeof(float));
  }
  for (int64_t e = 0; e < c.experts; ++e) {
    const Expert<T> x = routed<T>(c, e);
    if (x.rows) {
      const Expert<T> next = routed<T>(c, e + 1 < c.experts ? e + 1 : e);
      pass.run(c, x, e + 1 < c.experts ? &next : nullptr, Put::add, sums);
    } else if (x.d_gate) {
      memset(x.d_gate, 0, 2 * numbers * sizeof(T));
      memset(x.d_down, 0, numbers * sizeof(T));
    }
  }
  return true;
}

}  // namespace

bool experts_forward_sums(const ExpertsCall& call, float* sums) {
  return call.number == Number::f32 ? all<float, Forward<float>>(call, sums)
                                    : all<bf16, Forward<bf16>>(call, sums);
}

bool experts_backward_sums(const ExpertsCall& call, float* sums) {
  return call.number == Number::f32 ? all<float, Backward<float>>(call, sums)
                                    : all<bf16, Backward<bf16>>(call, sums);
}

void round_sums(Number number, const float* sums, const void* more, int64_t count, void* out) {
  if (number == Number::f32) {
    round_to(sums, static_cast<const float*>(more), count, static_cast<float*>(out));
  } else {
    round_to(sums, static_cast<const bf16*>(more), count, static_cast<bf16*>(out));
  }
}

bool experts_forward(const ExpertsCall& call) {
  Memory memory;
  float* sums = memory.take<float>(call.tokens * call.width);
  if (!memory.obtain()) return false;
  memory.place(&sums);
  if (!experts_forward_sums(call, sums)) return false;
  round_sums(call.number, sums, nullptr, call.tokens * call.width, call.y);
  return true;
}

bool experts_backward(const ExpertsCall& call) {
  Memory memory;
  float* sums = memory.take<float>(call.tokens * call.width);
  if (!memory.obtain()) return false;
  memory.place(&sums);
  if (!experts_backward_sums(call, sums)) return false;
  round_sums(call.number, sums, nullptr, call.tokens * call.width, call.d_h);
  return true;
}

}  // namespace qnext::QNEXT_ISA
