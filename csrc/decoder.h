// The decoder, run natively: one call is one step of the whole model. The plan (which weights, in
// which order) is built once from Python; a step is a list of sequences with their new tokens.
//
// Every thread runs the same program over its share of the work and meets the others at barriers.
// Activations are float32 throughout; the residual stream h is added to in a fixed order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "gated_delta.h"
#include "linear.h"
#include "threads.h"

namespace qnext {

// gate and up are one matrix with their tiles interleaved (`gate_up`), or two.
struct FeedForward {
  Matrix gate_up, gate, up, down;
  int64_t width = 0;
};

struct Layer {
  bool is_attention = false;
  const float* input_norm = nullptr;  // [D], 1 already added where the convention wants it
  const float* post_norm = nullptr;

  // Attention: rows of q_proj are query and gate alternating per head when gated.
  Matrix q, k, v, o;
  const float *q_norm = nullptr, *k_norm = nullptr;
  int64_t pages_layer = 0;

  // Delta.
  Matrix qkvz, ba, out;
  const float *conv = nullptr, *a_log = nullptr, *dt_bias = nullptr, *gated_norm = nullptr;
  int64_t state_layer = 0;

  // Feed-forward: routed experts when `router` has rows, and `shared` (or the dense one).
  Matrix router;
  std::vector<FeedForward> experts;
  FeedForward shared;
  // Of all experts together, so that a step need not look at hundreds of them: what formats of
  // activations their products take (bits), and the widest.
  unsigned expert_inputs = 0, expert_downs = 0;
  int64_t expert_width = 0;
  Matrix shared_gate;  // [1, D]; without rows the shared part has weight one

  void add_expert(const FeedForward& expert);
};

struct Shape {
  int64_t hidden = 0, vocabulary = 0;
  int64_t query_heads = 0, kv_heads = 0, head_dim = 0, rotary = 0;
  bool gated_attention = false;
  int64_t key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0, taps = 0;
  int64_t experts_per_token = 0;
  bool rescale_top_k = false;
  float eps = 1e-6f;
  float rope_multiplier = 1.0f;
};

// The tensors of a cache; layouts are those of HybridCache.
struct Cache {
  bool is_bf16 = false;
  uint8_t* pages = nullptr;  // [pages][attention layers][2][page size][G][H]
  int64_t page_size = 64, page_layers = 1;
  float* recurrent = nullptr;  // [delta layers][slots][W][K][M]
  uint8_t* conv = nullptr;     // [delta layers][slots][J-1][ch]
  int64_t slots = 0, number_bytes = 4;
  uint8_t* last_hidden = nullptr;  // [slots][D], of the type of the pages
  // What a speculative step leaves behind until the next one, [delta layers][num][most][...]: how
  // each token would change the state, and its convolution inputs.
  int64_t num_pending = 0, most_pending = 0;
  float* pending = nullptr;
  uint8_t* pending_window = nullptr;
};

struct Sequence {
  int64_t row = 0;      // first packed row
  int64_t tokens = 0;   // new tokens
  int64_t before = 0;   // position of the first one
  int64_t first = 0;    // first position that exists
  int64_t slot = 0;
  int64_t kept = 0;     // pending tokens that were accepted
  int64_t pending = 0;  // where they are
  bool speculative = false;
  const int64_t* pages = nullptr;
};

struct Capture {
  int64_t sequence = 0, count = 0, slot = 0;
};

struct Step {
  const int32_t* ids = nullptr;  // [P]
  int64_t rows = 0;              // P
  std::vector<Sequence> sequences;
  std::vector<Capture> captures;
  const float* hidden_in = nullptr;  // MTP only: [P][D]
  float* hidden = nullptr;           // [P][D] out
  const int32_t* logit_rows = nullptr;
  int64_t logit_count = 0;
  float* logits = nullptr;  // [logit_count][rows of the head]
  const Matrix* head = nullptr;  // another than the decoder's own
  // MTP only: rows beside the logit rows, which are the last of their sequences, leave their keys and
  // values and nothing else; hidden is [logit_count][D].
  bool only_last = false;
  int32_t* routes = nullptr;  // [sparse layers][P][k] out: the experts that ran; may be null
};

class Decoder {
 public:
  explicit Decoder(const Shape& shape) : shape_(shape) {}

  Shape shape_;
  Matrix embedding, head;
  std::vector<float> frequencies;  // [rotary / 2]
  const float* final_norm = nullptr;
  std::vector<Layer> layers;
  // Multi-token prediction; absent when mtp_fc has no rows.
  Matrix mtp_fc;
  const float *mtp_embedding_norm = nullptr, *mtp_hidden_norm = nullptr, *mtp_norm = nullptr;
  Layer mtp_layer;
  Cache cache;

  void forward(const Step& step, ThreadPool& pool);
  void forward_mtp(const Step& step, ThreadPool& pool);

  // Apply `kept` pending tokens of a slot to its state, in every delta layer.
  void settle(int64_t slot, int64_t pending, int64_t kept, ThreadPool& pool);

  // Bytes of the working buffers at present.
  int64_t workspace_bytes() const;

  // Distinct routed experts that the last step read, summed over its layers.
  int64_t experts_read() const { return experts_read_; }

 private:
  struct Work;
  void reserve(const Step& step, int threads, bool is_mtp);
  void reserve_attention(const Step& step, int threads);
  void run_layer(const Layer& layer, const Step& step, Team& team, const Layer* next);
  void attention(const Layer& layer, const Step& step, Team& team);
  void delta(const Layer& layer, const Step& step, Team& team);
  void leave_keys(const Layer& layer, int64_t rows, Team& team);
  Step last_rows(const Step& step) const;
  void go_on_with(const Step& wide, const Step& narrow);
  AttentionJob attention_job(const Layer& layer) const;
  DeltaLayer delta_layer(const Layer& layer) const;
  DeltaSequence delta_sequence(const Layer& layer, int64_t slot, int64_t pending) const;
  void fill_delta_sequences(const Layer& layer, const Step& step);
  void feed_forward(const Layer& layer, const Step& step, Team& team, const Layer* next);
  void route(const Layer& layer, const Step& step, Team& team);
  void gate_up_of_few(const Layer& layer, int64_t rows, Team& team, const uint8_t* then);
  void gate_up_of_many(const Layer& layer, int64_t rows, Team& team);
  void project_down(const Layer& layer, int64_t rows, Team& team, const uint8_t* then);
  void group_by_expert(int64_t experts, int64_t rows);
  void project_back(const Layer& layer, int64_t rows, Team& team);
  void rotary_table(const Step& step, Team& team);
  void finish(const Step& step, const float* norm, Team& team);

  std::shared_ptr<Work> work_;
  int64_t experts_read_ = 0;
  int64_t routed_layers_ = 0;  // of the running step, so far
};

}  // namespace qnext
