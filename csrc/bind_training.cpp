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

// Slots by expert, in rising order within one.
void sort_slots(const int64_t* ids, int64_t count, int64_t experts, int32_t* order,
                int64_t* starts) {
  for (int64_t e = 0; e <= experts; ++e) starts[e] = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= experts) {
      throw std::out_of_range("ids: expected the numbers of experts, from 0 to " +
                              std::to_string(experts - 1) + "; found " + std::to_string(ids[i]) +
                              ".");
    }
    ++starts[ids[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  std::vector<int64_t> next(starts, starts + experts);
  for (int64_t i = 0; i < count; ++i) order[next[static_cast<size_t>(ids[i])]++] = static_cast<int32_t>(i);
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
        sort_slots(at<int64_t>(ids), call.tokens * call.slots, call.experts, at<int32_t>(order),
                   at<int64_t>(starts));
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
         Address weight, Address y, Address inverse) {
        NormCall call = norm_call(rows, width, stride, half, x, weight, inverse);
        call.eps = eps;
        call.y = at<void>(y);
        training_kernels(current_isa()).norm_forward(call);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Zero-centred norm: rows of x `stride` numbers apart, weight [D] -> y [rows, D] and what\n"
      "each row was multiplied by, inverse [rows].");
  m.def(
      "norm_backward",
      [](int64_t rows, int64_t width, int64_t stride, bool half, Address x, Address weight,
         Address inverse, Address d_y, Address d_x, Address d_weight) {
        NormCall call = norm_call(rows, width, stride, half, x, weight, inverse);
        call.d_y = at<void>(d_y);
        call.d_x = at<void>(d_x);
        call.d_weight = at<float>(d_weight);
        obtained(training_kernels(current_isa()).norm_backward(call));
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "As norm_forward, with inverse and d_y -> d_x [rows, D] and d_weight [D].");
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
