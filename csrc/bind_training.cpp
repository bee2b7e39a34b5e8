// qnext._native: forward and backward passes of training. Tensors arrive as addresses; the Python
// side (ops/*_native.py) has checked shapes, types and that they are contiguous.
#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "training.h"

namespace qnext {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void obtained(bool good) {
  if (!good) throw std::bad_alloc();
}

void sort(const ExpertsCall& call, const int64_t* ids) {
  const int64_t count = call.tokens * call.slots;
  if (sort_slots(ids, count, call.experts, call.order, call.starts)) return;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] < call.experts) continue;
    throw std::out_of_range("ids: expected the numbers of experts, from 0 to " +
                            std::to_string(call.experts - 1) + "; found " + std::to_string(ids[i]) +
                            ".");
  }
}

ExpertsCall experts_call(const std::vector<int64_t>& shape, bool half, uintptr_t h,
                         uintptr_t weights, uintptr_t gate_up, uintptr_t down, uintptr_t order,
                         uintptr_t starts, uintptr_t before) {
  ExpertsCall call = {};
  call.number = half ? Number::bf16 : Number::f32;
  call.tokens = shape.at(0);
  call.slots = shape.at(1);
  call.experts = shape.at(2);
  call.width = shape.at(3);
  call.inner = shape.at(4);
  call.h = at<void>(h);
  call.weights = at<float>(weights);
  call.gate_up = at<void>(gate_up);
  call.down = at<void>(down);
  call.order = at<int32_t>(order);
  call.starts = at<int64_t>(starts);
  call.before = at<void>(before);
  return call;
}

// kept: h, router, gate_up, down, order, starts, before, logits, ids, weights, and with a shared
// expert: gate, up, down, opening, share, before.
SparseCall sparse_call(const std::vector<int64_t>& shape, bool half, bool rescale,
                       const std::vector<uintptr_t>& kept) {
  SparseCall call = {};
  call.experts = experts_call(shape, half, kept.at(0), kept.at(9), kept.at(2), kept.at(3),
                              kept.at(4), kept.at(5), kept.at(6));
  call.rescale = rescale;
  call.router = at<float>(kept.at(1));
  call.logits = at<float>(kept.at(7));
  call.ids = at<int64_t>(kept.at(8));
  call.weights = at<float>(kept.at(9));
  SharedExpert& shared = call.experts.shared;
  shared.inner = shape.at(5);
  if (!shared.inner) return call;
  shared.gate = at<void>(kept.at(10));
  shared.up = at<void>(kept.at(11));
  shared.down = at<void>(kept.at(12));
  call.opening = at<void>(kept.at(13));
  shared.share = at<float>(kept.at(14));
  shared.before = at<void>(kept.at(15));
  return call;
}

DeltaLayerCall delta_call(const std::vector<int64_t>& shape, const std::vector<int64_t>& starts,
                          bool half, float eps, const std::vector<uintptr_t>& kept) {
  DeltaLayerCall call = {};
  call.number = half ? Number::bf16 : Number::f32;
  call.key_heads = shape.at(0);
  call.value_heads = shape.at(1);
  call.key_dim = shape.at(2);
  call.value_dim = shape.at(3);
  call.taps = shape.at(4);
  call.chunk = shape.at(5);
  call.documents = static_cast<int64_t>(starts.size()) - 1;
  call.starts = starts.data();
  call.tokens = starts.back();
  call.eps = eps;
  call.qkvz = at<void>(kept.at(0));
  call.ba = at<void>(kept.at(1));
  call.conv = at<float>(kept.at(2));
  call.a_log = at<float>(kept.at(3));
  call.dt_bias = at<float>(kept.at(4));
  call.norm = at<float>(kept.at(5));
  call.states = at<float>(kept.at(6));
  call.written = at<float>(kept.at(7));
  call.out = at<float>(kept.at(8));
  return call;
}

AttentionCall attention_call(const std::vector<int64_t>& shape, const std::vector<int64_t>& starts,
                             bool half, float scale, uintptr_t q, uintptr_t k, uintptr_t v,
                             uintptr_t y, uintptr_t lse) {
  AttentionCall call = {};
  call.number = half ? Number::bf16 : Number::f32;
  call.query_heads = shape.at(0);
  call.key_heads = shape.at(1);
  call.width = shape.at(2);
  call.documents = static_cast<int64_t>(starts.size()) - 1;
  call.starts = starts.data();
  call.scale = scale;
  call.q = at<void>(q);
  call.k = at<void>(k);
  call.v = at<void>(v);
  call.y = at<void>(y);
  call.lse = at<float>(lse);
  return call;
}

NormCall norm_call(int64_t rows, int64_t width, int64_t stride, bool half, uintptr_t x,
                   uintptr_t weight, uintptr_t inverse) {
  NormCall call = {};
  call.number = half ? Number::bf16 : Number::f32;
  call.rows = rows;
  call.width = width;
  call.stride = stride;
  call.x = at<void>(x);
  call.weight = at<float>(weight);
  call.inverse = at<float>(inverse);
  return call;
}

}  // namespace

void bind_training(nb::module_& m) {
  using Address = uintptr_t;
  m.def(
      "experts_forward",
      [](const std::vector<int64_t>& shape, bool half, Address h, Address ids, Address weights,
         Address gate_up, Address down, Address order, Address starts, Address before, Address y) {
        ExpertsCall call =
            experts_call(shape, half, h, weights, gate_up, down, order, starts, before);
        call.y = at<void>(y);
        sort(call, at<int64_t>(ids));
        obtained(training_kernels(current_isa()).experts_forward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "shape (P, X, E, D, F), whether numbers are bfloat16, then addresses of h [P, D], ids [P, X]\n"
      "int64, weights [P, X], gate_up [E, 2F, D], down [E, D, F]; written are order [P X] int32,\n"
      "starts [E + 1] int64, before [P X, 2F] and y [P, D].");
  m.def(
      "experts_backward",
      [](const std::vector<int64_t>& shape, bool half, Address h, Address weights, Address gate_up,
         Address down, Address order, Address starts, Address before, Address d_y, Address d_h,
         Address d_weights, Address d_gate_up, Address d_down) {
        ExpertsCall call =
            experts_call(shape, half, h, weights, gate_up, down, order, starts, before);
        call.d_y = at<void>(d_y);
        call.d_h = at<void>(d_h);
        call.d_weights = at<float>(d_weights);
        call.d_gate_up = at<void>(d_gate_up);
        call.d_down = at<void>(d_down);
        obtained(training_kernels(current_isa()).experts_backward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As experts_forward, with what it wrote, then d_y [P, D]; written are the gradients of h,\n"
      "weights, gate_up and down.");
  m.def(
      "sparse_layer_forward",
      [](const std::vector<int64_t>& shape, bool half, bool rescale,
         const std::vector<Address>& kept, Address residual, Address y) {
        SparseCall call = sparse_call(shape, half, rescale, kept);
        call.residual = at<void>(residual);
        call.experts.y = at<void>(y);
        obtained(training_kernels(current_isa()).sparse_forward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "shape (P, X, E, D, F, F of the shared expert or 0), whether numbers are bfloat16, whether\n"
      "weights are rescaled; addresses of h [P, D], router [E, D] float32, gate_up, down, then of\n"
      "what is written: order, starts, before (as experts_forward), logits [P, E], ids and weights\n"
      "[P, X]; with a shared expert of gate, up, down and opening [1, D], and of what is written:\n"
      "share [P] float32 and before [P, 2F]; of a residual [P, D] or 0, and of y [P, D].");
  m.def(
      "sparse_layer_backward",
      [](const std::vector<int64_t>& shape, bool half, bool rescale,
         const std::vector<Address>& kept, Address d_y, Address d_logits,
         const std::vector<Address>& gradients) {
        SparseCall call = sparse_call(shape, half, rescale, kept);
        ExpertsCall& experts = call.experts;
        experts.d_y = at<void>(d_y);
        call.d_logits = at<float>(d_logits);
        experts.d_h = at<void>(gradients.at(0));
        call.d_router = at<float>(gradients.at(1));
        experts.d_gate_up = at<void>(gradients.at(2));
        experts.d_down = at<void>(gradients.at(3));
        experts.d_weights = at<float>(gradients.at(4));
        SharedExpert& shared = experts.shared;
        if (shared.inner) {
          shared.d_gate = at<void>(gradients.at(5));
          shared.d_up = at<void>(gradients.at(6));
          shared.d_down = at<void>(gradients.at(7));
          call.d_opening = at<void>(gradients.at(8));
          shared.d_share = at<float>(gradients.at(9));
        }
        obtained(training_kernels(current_isa()).sparse_backward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As sparse_layer_forward, with what it wrote, d_y, and d_logits or 0; then where gradients of\n"
      "h, router, gate_up, down, weights go, and of gate, up, down, opening and share.");
  m.def(
      "delta_layer_forward",
      [](const std::vector<int64_t>& shape, const std::vector<int64_t>& starts, bool half,
         float eps, const std::vector<Address>& kept, Address y) {
        DeltaLayerCall call = delta_call(shape, starts, half, eps, kept);
        call.y = at<void>(y);
        obtained(training_kernels(current_isa()).delta_forward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "shape (U, W, K, M, J, tokens of a chunk), where documents begin and the last ends, whether\n"
      "numbers are bfloat16, eps of the norm; addresses of qkvz, ba, conv [ch, J], A_log, dt_bias,\n"
      "norm [M], then of what is written: states [chunks, W, K, M], written and out [P, W, M]; and\n"
      "y [P, W M].");
  m.def(
      "delta_layer_backward",
      [](const std::vector<int64_t>& shape, const std::vector<int64_t>& starts, bool half,
         float eps, const std::vector<Address>& kept, Address d_y,
         const std::vector<Address>& gradients) {
        DeltaLayerCall call = delta_call(shape, starts, half, eps, kept);
        call.d_y = at<void>(d_y);
        call.d_qkvz = at<void>(gradients.at(0));
        call.d_ba = at<void>(gradients.at(1));
        call.d_conv = at<float>(gradients.at(2));
        call.d_a_log = at<float>(gradients.at(3));
        call.d_dt_bias = at<float>(gradients.at(4));
        call.d_norm = at<float>(gradients.at(5));
        obtained(training_kernels(current_isa()).delta_backward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As delta_layer_forward, with what it wrote, then d_y and where the gradients of qkvz, ba,\n"
      "conv, A_log, dt_bias and norm go.");
  m.def(
      "attention_forward",
      [](const std::vector<int64_t>& shape, const std::vector<int64_t>& starts, bool half,
         float scale, Address q, Address k, Address v, Address y, Address lse) {
        const AttentionCall call =
            attention_call(shape, starts, half, scale, q, k, v, y, lse);
        obtained(training_kernels(current_isa()).attention_forward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "shape (N, G, H), where documents begin and the last ends, whether numbers are bfloat16, the\n"
      "scale; addresses of q [P, N, H], k and v [P, G, H]; written are y [P, N, H] and lse [P, N].");
  m.def(
      "attention_backward",
      [](const std::vector<int64_t>& shape, const std::vector<int64_t>& starts, bool half,
         float scale, Address q, Address k, Address v, Address y, Address lse, Address d_y,
         Address d_q, Address d_k, Address d_v) {
        AttentionCall call = attention_call(shape, starts, half, scale, q, k, v, y, lse);
        call.d_y = at<void>(d_y);
        call.d_q = at<void>(d_q);
        call.d_k = at<void>(d_k);
        call.d_v = at<void>(d_v);
        obtained(training_kernels(current_isa()).attention_backward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As attention_forward, with what it wrote, then d_y; written are the gradients of q, k, v.");
  m.def(
      "norm_forward",
      [](int64_t rows, int64_t width, int64_t stride, bool half, float eps, Address x,
         Address weight, Address y, Address inverse, Address added, Address sum) {
        NormCall call = norm_call(rows, width, stride, half, x, weight, inverse);
        call.eps = eps;
        call.y = at<void>(y);
        call.added = at<void>(added);
        call.sum = at<void>(sum);
        training_kernels(current_isa()).norm_forward(call);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Zero-centred norm: rows of x `stride` numbers apart, weight [D] -> y [rows, D] and what\n"
      "each row was multiplied by, inverse [rows]. Where added [rows, D] is not 0, x + added is\n"
      "normed instead and written to sum.");
  m.def(
      "norm_backward",
      [](int64_t rows, int64_t width, int64_t stride, bool half, Address x, Address weight,
         Address inverse, Address d_y, Address d_sum, Address d_x, Address d_weight) {
        NormCall call = norm_call(rows, width, stride, half, x, weight, inverse);
        call.d_y = at<void>(d_y);
        call.d_sum = at<void>(d_sum);
        call.d_x = at<void>(d_x);
        call.d_weight = at<float>(d_weight);
        obtained(training_kernels(current_isa()).norm_backward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As norm_forward, with what was normed as x, inverse and d_y -> d_x [rows, D], to which d_sum\n"
      "is added unless it is 0, and d_weight [D].");
  m.def(
      "route_forward",
      [](int64_t rows, int64_t experts, int64_t slots, bool rescale, Address logits,
         Address weights, Address ids) {
        RouteCall call = {rows, experts, slots, rescale, at<float>(logits), at<float>(weights),
                          at<int64_t>(ids), nullptr, nullptr};
        training_kernels(current_isa()).route_forward(call);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "logits [rows, E] -> weights and ids [rows, X]: the largest of the softmax, rescaled or not.");
  m.def(
      "route_backward",
      [](int64_t rows, int64_t experts, int64_t slots, bool rescale, Address logits,
         Address weights, Address ids, Address d_weights, Address d_logits) {
        RouteCall call = {rows, experts, slots, rescale, at<float>(logits), at<float>(weights),
                          at<int64_t>(ids), at<float>(d_weights), at<float>(d_logits)};
        training_kernels(current_isa()).route_backward(call);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As route_forward, with what it wrote and d_weights -> d_logits [rows, E].");
  m.def(
      "load_forward",
      [](int64_t rows, int64_t experts, int64_t slots, Address logits, Address lse, Address counts,
         Address probability, Address squares, Address entropy) {
        LoadCall call = {};
        call.rows = rows;
        call.experts = experts;
        call.slots = slots;
        call.logits = at<float>(logits);
        call.lse = at<float>(lse);
        call.counts = at<int64_t>(counts);
        call.probability = at<float>(probability);
        call.squares = at<float>(squares);
        call.entropy = at<float>(entropy);
        obtained(training_kernels(current_isa()).load_forward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "logits [rows, E] -> lse [rows], counts [E] int64, probability [E], and the sums of lse\n"
      "squared and of the entropy.");
  m.def(
      "load_backward",
      [](int64_t rows, int64_t experts, Address logits, Address lse, Address d_probability,
         double d_squares, Address d_logits) {
        LoadCall call = {};
        call.rows = rows;
        call.experts = experts;
        call.logits = at<float>(logits);
        call.lse = at<float>(lse);
        call.d_probability = at<float>(d_probability);
        call.d_squares = static_cast<float>(d_squares);
        call.d_logits = at<float>(d_logits);
        training_kernels(current_isa()).load_backward(call);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As load_forward, with lse and the gradients of probability [E] and of the sum of squares\n"
      "-> d_logits [rows, E].");
  m.def(
      "cross_entropy",
      [](int64_t rows, int64_t vocabulary, bool half, bool slopes, Address logits, Address labels,
         Address weights, Address loss, Address lse, Address hits) {
        CrossEntropyCall call = {half ? Number::bf16 : Number::f32, rows, vocabulary,
                                 at<void>(logits), at<int64_t>(labels), at<float>(weights), slopes,
                                 at<float>(loss), at<float>(lse), at<bool>(hits)};
        for (int64_t p = 0; p < rows; ++p) {
          if (call.labels[p] < 0 || call.labels[p] >= vocabulary) {
            throw std::out_of_range("labels: expected ids from 0 to " +
                                    std::to_string(vocabulary - 1) + ", found " +
                                    std::to_string(call.labels[p]) + ".");
          }
        }
        training_kernels(current_isa()).cross_entropy(call);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "logits [rows, V], labels and weights [rows] -> loss, lse and hits (bool); with `slopes` the\n"
      "logits become weight (softmax - label).");
  m.def(
      "adam_step",
      [](int64_t count, Address master, Address first, Address second, Address gradient,
         Address working, const std::vector<double>& numbers) {
        const auto number = [&](size_t i) { return static_cast<float>(numbers.at(i)); };
        const AdamCall call = {count, at<float>(master), at<float>(first), at<float>(second),
                               at<float>(gradient), at<void>(working), number(0), number(1),
                               number(2), number(3), number(4), number(5), number(6)};
        training_kernels(current_isa()).adam(call);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "One step over `count` numbers; working is the address of a bfloat16 copy or 0. numbers:\n"
      "scale of the gradient, what is kept of the master, 1 - beta of both moments, the rate over\n"
      "the correction of the first, 1 / sqrt of that of the second, epsilon.");
}

}  // namespace qnext
