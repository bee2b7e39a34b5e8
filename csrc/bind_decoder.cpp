// The plan of a decoder, filled from Python once, and its step.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "decoder.h"
#include "step.h"

namespace qnext {
namespace {

// Vectors of floats of a layer by name; Python keeps the arrays alive.
const float*& floats_of(Layer& layer, const std::string& name) {
  if (name == "input_norm") return layer.input_norm;
  if (name == "post_norm") return layer.post_norm;
  if (name == "q_norm") return layer.q_norm;
  if (name == "k_norm") return layer.k_norm;
  if (name == "conv") return layer.conv;
  if (name == "a_log") return layer.a_log;
  if (name == "dt_bias") return layer.dt_bias;
  if (name == "gated_norm") return layer.gated_norm;
  throw nb::key_error(name.c_str());
}

const float*& floats_of(Decoder& decoder, const std::string& name) {
  if (name == "final_norm") return decoder.final_norm;
  if (name == "mtp_norm") return decoder.mtp_norm;
  if (name == "mtp_embedding_norm") return decoder.mtp_embedding_norm;
  if (name == "mtp_hidden_norm") return decoder.mtp_hidden_norm;
  throw nb::key_error(name.c_str());
}

void run(Decoder& decoder, bool is_mtp, Array<const int32_t> ids, Array<const int64_t> sequences,
         Array<const int64_t> pages, Array<const int64_t> captures, nb::object hidden_in,
         Array<float> hidden, Array<const int32_t> logit_rows, Array<float> logits,
         int32_t* routes = nullptr) {
  Step step = step_of(ids, sequences, pages);
  const auto C = static_cast<int64_t>(captures.size()) / 3;
  for (int64_t c = 0; c < C; ++c) {
    const int64_t* s = captures.data() + c * 3;
    step.captures.push_back({s[0], s[1], s[2]});
  }
  Array<const float> source;
  if (!hidden_in.is_none()) {
    source = nb::cast<Array<const float>>(hidden_in);
    step.hidden_in = source.data();
  }
  step.hidden = hidden.data();
  step.logit_rows = logit_rows.data();
  step.logit_count = static_cast<int64_t>(logit_rows.size());
  step.logits = logits.data();
  step.routes = routes;
  nb::gil_scoped_release release;
  if (is_mtp) {
    decoder.forward_mtp(step, pool());
  } else {
    decoder.forward(step, pool());
  }
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<>())
      // The caller keeps the memory alive: one object per array would be slow for 50,000 experts.
      .def("__init__",
           [](Matrix* self, int format, int64_t rows, int64_t cols, uintptr_t address,
              int64_t bytes) {
             const auto kind = static_cast<Format>(format);
             if (bytes < matrix_bytes(kind, rows, cols)) {
               throw nb::value_error("Matrix: the data are shorter than the shape says.");
             }
             if (format >= 2 && address % 64) {
               throw nb::value_error("Matrix: packed data must start on a 64-byte line.");
             }
             new (self) Matrix{kind, rows, cols, reinterpret_cast<const void*>(address)};
           })
      .def_ro("rows", &Matrix::rows)
      .def_ro("cols", &Matrix::cols);
  nb::class_<FeedForward>(m, "FeedForward")
      .def(nb::init<>())
      .def_rw("gate_up", &FeedForward::gate_up)
      .def_rw("gate", &FeedForward::gate)
      .def_rw("up", &FeedForward::up)
      .def_rw("down", &FeedForward::down)
      .def_rw("width", &FeedForward::width);
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<>())
      .def_rw("is_attention", &Layer::is_attention)
      .def_rw("q", &Layer::q)
      .def_rw("k", &Layer::k)
      .def_rw("v", &Layer::v)
      .def_rw("o", &Layer::o)
      .def_rw("pages_layer", &Layer::pages_layer)
      .def_rw("qkvz", &Layer::qkvz)
      .def_rw("ba", &Layer::ba)
      .def_rw("out", &Layer::out)
      .def_rw("state_layer", &Layer::state_layer)
      .def_rw("router", &Layer::router)
      .def_rw("shared", &Layer::shared)
      .def_rw("shared_gate", &Layer::shared_gate)
      .def("add_expert", &Layer::add_expert)
      .def("set_floats", [](Layer& self, const std::string& name, Array<const float> x) {
        floats_of(self, name) = x.data();
      });
  nb::class_<Shape>(m, "Shape")
      .def(nb::init<>())
      .def_rw("hidden", &Shape::hidden)
      .def_rw("vocabulary", &Shape::vocabulary)
      .def_rw("query_heads", &Shape::query_heads)
      .def_rw("kv_heads", &Shape::kv_heads)
      .def_rw("head_dim", &Shape::head_dim)
      .def_rw("rotary", &Shape::rotary)
      .def_rw("gated_attention", &Shape::gated_attention)
      .def_rw("key_heads", &Shape::key_heads)
      .def_rw("value_heads", &Shape::value_heads)
      .def_rw("key_dim", &Shape::key_dim)
      .def_rw("value_dim", &Shape::value_dim)
      .def_rw("taps", &Shape::taps)
      .def_rw("experts_per_token", &Shape::experts_per_token)
      .def_rw("rescale_top_k", &Shape::rescale_top_k)
      .def_rw("eps", &Shape::eps)
      .def_rw("rope_multiplier", &Shape::rope_multiplier);
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<const Shape&>())
      .def_rw("embedding", &Decoder::embedding)
      .def_rw("head", &Decoder::head)
      .def_rw("frequencies", &Decoder::frequencies)
      .def_rw("mtp_fc", &Decoder::mtp_fc)
      .def_rw("mtp_layer", &Decoder::mtp_layer)
      .def("add_layer", [](Decoder& self, const Layer& layer) { self.layers.push_back(layer); })
      .def("set_floats",
           [](Decoder& self, const std::string& name, Array<const float> x) {
             floats_of(self, name) = x.data();
           })
      .def("set_cache",
           [](Decoder& self, Array<uint8_t> pages, int64_t page_layers, int64_t page_size,
              bool is_bf16, Array<float> recurrent, Array<uint8_t> conv, int64_t slots,
              int64_t num_pending, int64_t most_pending, Array<float> pending,
              Array<uint8_t> pending_window, Array<uint8_t> last_hidden) {
             Cache& c = self.cache;
             c.is_bf16 = is_bf16;
             c.number_bytes = is_bf16 ? 2 : 4;
             c.pages = pages.data();
             c.page_layers = page_layers;
             c.page_size = page_size;
             c.recurrent = recurrent.data();
             c.conv = conv.data();
             c.slots = slots;
             c.num_pending = num_pending;
             c.most_pending = most_pending;
             c.pending = pending.data();
             c.pending_window = pending_window.data();
             c.last_hidden = last_hidden.data();
           })
      .def("settle",
           [](Decoder& self, int64_t slot, int64_t pending, int64_t kept) {
             nb::gil_scoped_release release;
             self.settle(slot, pending, kept, pool());
           })
      .def_prop_ro("workspace_bytes", &Decoder::workspace_bytes)
      .def_prop_ro("experts_read", &Decoder::experts_read)
      .def(
          "forward",
          [](Decoder& self, Array<const int32_t> ids, Array<const int64_t> sequences,
             Array<const int64_t> pages, Array<const int64_t> captures, Array<float> hidden,
             Array<const int32_t> logit_rows, Array<float> logits, nb::object routes) {
            Array<int32_t> target;
            if (!routes.is_none()) target = nb::cast<Array<int32_t>>(routes);
            run(self, false, ids, sequences, pages, captures, nb::none(), hidden, logit_rows,
                logits, routes.is_none() ? nullptr : target.data());
          },
          nb::arg("ids"), nb::arg("sequences"), nb::arg("pages"), nb::arg("captures"),
          nb::arg("hidden"), nb::arg("logit_rows"), nb::arg("logits"),
          nb::arg("routes") = nb::none())
      .def(
          "forward_mtp",
          [](Decoder& self, Array<const int32_t> ids, Array<const int64_t> sequences,
             Array<const int64_t> pages, Array<const int64_t> captures, nb::object hidden_in,
             Array<float> hidden, Array<const int32_t> logit_rows, Array<float> logits) {
            run(self, true, ids, sequences, pages, captures, hidden_in, hidden, logit_rows, logits);
          },
          nb::arg("ids"), nb::arg("sequences"), nb::arg("pages"), nb::arg("captures"),
          nb::arg("hidden_in"), nb::arg("hidden"), nb::arg("logit_rows"), nb::arg("logits"));
}

}  // namespace qnext
