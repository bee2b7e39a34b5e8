// qnext._native.gated_delta: a delta layer between its projections, on slots of a cache.
#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "bindings.h"
#include "gated_delta.h"

namespace qnext {
namespace {

using AnyArray = nb::ndarray<nb::device::cpu, nb::c_contig>;

void expect(bool good, const std::string& message) {
  if (!good) throw nb::value_error(message.c_str());
}

template <typename A>
void expect_shape(const A& array, const char* name, const std::vector<int64_t>& shape) {
  std::string wanted, found;
  for (int64_t n : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
  for (size_t i = 0; i < array.ndim(); ++i) {
    found += (i ? ", " : "") + std::to_string(array.shape(i));
  }
  expect(wanted == found, std::string(name) + ": expected the shape [" + wanted + "], found [" +
                              found + "].");
}

WindowType window_type(const AnyArray& array, const char* name) {
  const nb::dlpack::dtype type = array.dtype();
  const bool f32 = type == nb::dtype<float>();
  const bool bf16 = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) &&
                    type.bits == 16 && type.lanes == 1;
  expect(f32 || bf16, std::string(name) + ": expected float32 or bfloat16.");
  return f32 ? WindowType::f32 : WindowType::bf16;
}

// Kept between calls: pages of fresh memory would cost more than a step of one token.
std::vector<char> scratch;
std::mutex scratch_lock;

struct Slots {
  float* state;
  char* window;
  float* pending;
  char* pending_window;
  int64_t count, capacity, state_size, window_bytes, token_floats, token_bytes;

  void place(int64_t slot, DeltaSequence* sequence) const {
    sequence->state = state + slot * state_size;
    sequence->window = window + slot * window_bytes;
    sequence->pending = pending + slot * capacity * token_floats;
    sequence->pending_window = pending_window + slot * capacity * token_bytes;
  }
};

void gated_delta(Array<const float> qkvz, Array<const float> ba, Array<const float> conv_weight,
                 Array<const float> a_log, Array<const float> dt_bias,
                 Array<const float> norm_weight, float eps, Array<float> state, AnyArray window,
                 Array<float> pending, AnyArray pending_window, Array<const int64_t> plan,
                 Array<const int64_t> captures, Array<float> y) {
  expect(state.ndim() == 4, "state: expected [slots, W, K, M].");
  expect(conv_weight.ndim() == 2, "conv_weight: expected [J, ch].");
  expect(qkvz.ndim() == 2, "qkvz: expected [P, 2 U K + 2 W M].");
  const auto dim = [](const auto& array, size_t i) { return static_cast<int64_t>(array.shape(i)); };
  DeltaLayer layer;
  DeltaShape& s = layer.shape;
  const int64_t count = dim(state, 0), rows = dim(qkvz, 0);
  s.value_heads = dim(state, 1);
  s.key_dim = dim(state, 2);
  s.value_dim = dim(state, 3);
  s.taps = dim(conv_weight, 0);
  const int64_t channels = dim(conv_weight, 1), values = s.value_heads * s.value_dim;
  expect(s.value_heads > 0 && s.key_dim > 0 && s.value_dim > 0 && s.taps > 0,
         "state, conv_weight: expected at least one head, dimension and tap.");
  s.key_heads = (channels - values) / (2 * s.key_dim);
  expect(s.key_heads > 0 && delta_channels(s) == channels && s.value_heads % s.key_heads == 0,
         "conv_weight: expected 2 U K + W M channels with W a multiple of U, found " +
             std::to_string(channels) + ".");
  expect_shape(qkvz, "qkvz", {rows, channels + values});
  expect_shape(ba, "ba", {rows, 2 * s.value_heads});
  expect_shape(a_log, "a_log", {s.value_heads});
  expect_shape(dt_bias, "dt_bias", {s.value_heads});
  expect_shape(norm_weight, "norm_weight", {s.value_dim});
  expect_shape(y, "y", {rows, values});
  expect_shape(window, "window", {count, s.taps - 1, channels});
  expect(pending.ndim() == 3, "pending: expected [slots, capacity, U K + W M + W].");
  const int64_t capacity = dim(pending, 1);
  expect(capacity <= kDeltaBlock,
         "pending: expected a capacity of at most " + std::to_string(kDeltaBlock) + " tokens.");
  expect_shape(pending, "pending", {count, capacity, delta_pending_floats(s)});
  expect_shape(pending_window, "pending_window", {count, capacity, channels});
  layer.window_type = window_type(window, "window");
  expect(window_type(pending_window, "pending_window") == layer.window_type,
         "pending_window: expected the dtype of window.");
  expect(plan.ndim() == 2, "plan: expected [sequences, 5].");
  expect_shape(plan, "plan", {dim(plan, 0), 5});
  expect(captures.ndim() == 2, "captures: expected [captures, 3].");
  expect_shape(captures, "captures", {dim(captures, 0), 3});

  const int64_t item_bytes = layer.window_type == WindowType::f32 ? 4 : 2;
  const Slots slots = {state.data(),
                       static_cast<char*>(window.data()),
                       pending.data(),
                       static_cast<char*>(pending_window.data()),
                       count,
                       capacity,
                       s.value_heads * s.key_dim * s.value_dim,
                       (s.taps - 1) * channels * item_bytes,
                       delta_pending_floats(s),
                       channels * item_bytes};
  const auto slot_of = [&](int64_t slot, const char* name) {
    expect(slot >= 0 && slot < count, std::string(name) + ": expected a slot below " +
                                          std::to_string(count) + ", found " +
                                          std::to_string(slot) + ".");
    return slot;
  };
  std::vector<DeltaSequence> sequences(plan.shape(0));
  std::vector<std::vector<DeltaCapture>> wishes(sequences.size());
  for (size_t b = 0; b < sequences.size(); ++b) {
    const int64_t* row = plan.data() + 5 * b;
    DeltaSequence& sequence = sequences[b];
    slots.place(slot_of(row[0], "plan"), &sequence);
    sequence.first_row = row[1];
    sequence.tokens = row[2];
    sequence.speculative = row[3] != 0;
    sequence.kept = row[4];
    expect(row[1] >= 0 && row[2] >= 0 && row[1] + row[2] <= rows,
           "plan: expected rows of qkvz, found the rows from " + std::to_string(row[1]) + " to " +
               std::to_string(row[1] + row[2]) + ".");
    expect(row[4] >= 0 && row[4] <= capacity && (!row[3] || row[2] <= capacity),
           "plan: expected at most " + std::to_string(capacity) + " kept or speculative tokens.");
  }
  for (size_t i = 0; i < captures.shape(0); ++i) {
    const int64_t* row = captures.data() + 3 * i;
    expect(row[0] >= 0 && row[0] < static_cast<int64_t>(sequences.size()),
           "captures: expected the number of a sequence of the plan.");
    const DeltaSequence& sequence = sequences[static_cast<size_t>(row[0])];
    expect(!sequence.speculative && row[1] > 0 && row[1] <= sequence.tokens,
           "captures: expected a count within the tokens of a settled sequence.");
    DeltaSequence target;
    slots.place(slot_of(row[2], "captures"), &target);
    wishes[static_cast<size_t>(row[0])].push_back({row[1], target.state, target.window});
  }
  for (size_t b = 0; b < sequences.size(); ++b) {
    sequences[b].captures = wishes[b].data();
    sequences[b].num_captures = static_cast<int64_t>(wishes[b].size());
  }
  layer.conv_weight = conv_weight.data();
  layer.a_log = a_log.data();
  layer.dt_bias = dt_bias.data();
  layer.norm_weight = norm_weight.data();
  layer.eps = eps;
  DeltaBatch batch;
  batch.qkvz = qkvz.data();
  batch.qkvz_stride = channels + values;
  batch.ba = ba.data();
  batch.ba_stride = 2 * s.value_heads;
  batch.y = y.data();
  batch.sequences = sequences.data();
  batch.num_sequences = static_cast<int64_t>(sequences.size());

  const DeltaKernels& kernels = delta_kernels(current_isa());
  nb::gil_scoped_release release;
  const int64_t bytes = (kernels.scratch_bytes(s) + 63) / 64 * 64;
  ThreadPool& threads = pool();
  const std::lock_guard<std::mutex> one_call(scratch_lock);
  scratch.resize(std::max(scratch.size(), static_cast<size_t>(bytes * threads.threads() + 64)));
  char* first = scratch.data();
  first += 63 - (reinterpret_cast<uintptr_t>(first) + 63) % 64;
  threads.run([&](Team& team) {
    kernels.forward(layer, batch, first + bytes * team.thread, team);
  });
}

}  // namespace

void bind_gated_delta(nb::module_& m) {
  m.def("gated_delta", &gated_delta, nb::arg("qkvz"), nb::arg("ba"), nb::arg("conv_weight"),
        nb::arg("a_log"), nb::arg("dt_bias"), nb::arg("norm_weight"), nb::arg("eps"),
        nb::arg("state"), nb::arg("window"), nb::arg("pending"), nb::arg("pending_window"),
        nb::arg("plan"), nb::arg("captures"), nb::arg("y"),
        "A delta layer between its projections, on slots.\n\n"
        "qkvz [P, 2UK + 2WM] and ba [P, 2W] in the checkpoint's order, conv_weight [J, ch],\n"
        "state [slots, W, K, M], window [slots, J-1, ch] and pending_window [slots, capacity, ch]\n"
        "float32 or bfloat16, pending [slots, capacity, UK + WM + W]; y [P, WM] is written.\n"
        "plan int64 [B, 5]: slot, first row, tokens, speculative, kept. captures int64 [N, 3]:\n"
        "sequence, count, slot.\n"
        "csrc/gated_delta.h says what kept and speculative mean. ValueError on a wrong shape.");
}

}  // namespace qnext
