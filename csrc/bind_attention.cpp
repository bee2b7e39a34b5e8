#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nanobind/stl/optional.h>

#include "attention.h"
#include "bindings.h"

namespace qnext {
namespace {

using Cache = nb::ndarray<nb::device::cpu, nb::c_contig, nb::ndim<6>>;
using Floats = Array<float>;
using Integers = nb::ndarray<const int64_t, nb::device::cpu, nb::c_contig, nb::ndim<1>>;
using Table = nb::ndarray<const int64_t, nb::device::cpu, nb::c_contig, nb::ndim<2>>;
using Weight = std::optional<nb::ndarray<const float, nb::device::cpu, nb::c_contig, nb::ndim<1>>>;

void require(bool fine, const char* what) {
  if (!fine) throw nb::value_error(what);
}

CacheType cache_type(const Cache& cache) {
  if (cache.dtype() == nb::dtype<float>()) return CacheType::f32;
  require(cache.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) &&
              cache.dtype().bits == 16,
          "cache: expected float32 or bfloat16.");
  return CacheType::bf16;
}

void attention(Array<const float> q, Floats k, Array<const float> v, Weight q_norm, Weight k_norm,
               float eps, Array<const float> cos, Array<const float> sin, float scale, Cache cache,
               int64_t layer, Table page_table, Integers rows, Integers tokens, Integers before,
               Integers first, bool gated, Floats out) {
  AttentionJob job;
  job.type = cache_type(cache);
  job.layers = cache.shape(1);
  job.page_size = cache.shape(3);
  job.kv_heads = cache.shape(4);
  job.head_size = cache.shape(5);
  require(q.ndim() == 2 && k.ndim() == 2 && v.ndim() == 2 && cos.ndim() == 2 && sin.ndim() == 2 &&
              out.ndim() == 2,
          "q, k, v, cos, sin, out: expected two dimensions.");
  const auto P = static_cast<int64_t>(q.shape(0));
  const int64_t H = job.head_size, wide = static_cast<int64_t>(out.shape(1));
  require(H >= 2 && H % 2 == 0, "cache: expected heads of an even size.");
  require(wide > 0 && wide % (H * job.kv_heads) == 0,
          "out: expected a multiple of the cache's kv heads times the size of a head.");
  job.heads = wide / H;
  const auto is = [P](const auto& x, int64_t width) {
    return static_cast<int64_t>(x.shape(0)) == P && static_cast<int64_t>(x.shape(1)) == width;
  };
  require(is(out, wide) && is(q, gated ? 2 * wide : wide) && is(k, job.kv_heads * H) &&
              is(v, job.kv_heads * H),
          "q, k, v, out: rows or widths do not agree with each other and the cache.");
  job.rotary = static_cast<int64_t>(cos.shape(1));
  require(is(cos, job.rotary) && is(sin, job.rotary) && job.rotary % 2 == 0 && job.rotary <= H,
          "cos, sin: expected one row per token and an even width of at most a head.");
  for (const Weight* weight : {&q_norm, &k_norm}) {
    require(!*weight || static_cast<int64_t>((*weight)->shape(0)) == H,
            "q_norm, k_norm: expected one weight per value of a head.");
  }
  require(layer >= 0 && layer < job.layers, "layer: the cache has no such layer.");
  require(scale > 0.0f, "scale: expected a positive number.");
  job.gated = gated;
  job.scale = scale;
  job.eps = eps;
  job.q_norm = q_norm ? q_norm->data() : nullptr;
  job.k_norm = k_norm ? k_norm->data() : nullptr;
  job.cos = cos.data();
  job.sin = sin.data();
  job.q = q.data();
  job.k = k.data();
  job.v = v.data();
  job.out = out.data();
  job.cache = cache.data();
  job.layer = layer;

  const size_t count = rows.shape(0);
  require(tokens.shape(0) == count && before.shape(0) == count && first.shape(0) == count &&
              page_table.shape(0) == count,
          "rows, tokens, before, first, page_table: expected one entry per sequence.");
  std::vector<AttentionSequence> sequences(count);
  for (size_t b = 0; b < count; ++b) {
    AttentionSequence& s = sequences[b];
    const auto columns = static_cast<int64_t>(page_table.shape(1));
    s = {rows(b), tokens(b), before(b), first(b), page_table.data() + b * columns};
    require(s.row >= 0 && s.tokens >= 0 && s.row + s.tokens <= P, "rows: outside of q.");
    require(s.first >= 0 && s.first <= s.before, "first: expected 0 ... before.");
    const int64_t pages = (s.before + s.tokens + job.page_size - 1) / job.page_size;
    require(pages <= columns, "page_table: too few pages for the tokens.");
    for (int64_t i = s.first / job.page_size; s.tokens > 0 && i < pages; ++i) {
      require(s.pages[i] >= 0 && s.pages[i] < static_cast<int64_t>(cache.shape(0)),
              "page_table: the cache has no such page.");
    }
  }
  job.sequences = sequences.data();
  job.count = static_cast<int64_t>(count);

  nb::gil_scoped_release release;
  const AttentionKernels& kernels = attention_kernels(current_isa());
  const int64_t bytes = (kernels.scratch_bytes(job, pool().threads()) + 63) / 64 * 64;
  const std::unique_ptr<void, decltype(&std::free)> scratch(
      std::aligned_alloc(64, static_cast<size_t>(bytes)), &std::free);
  if (!scratch) throw std::bad_alloc();
  pool().run([&](Team& team) {
    kernels.append(job, scratch.get(), team);
    team.barrier();
    kernels.attend(job, scratch.get(), team);
  });
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"),
        nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"), nb::arg("cos"),
        nb::arg("sin"), nb::arg("scale"), nb::arg("cache"), nb::arg("layer"),
        nb::arg("page_table"), nb::arg("rows"), nb::arg("tokens"), nb::arg("before"),
        nb::arg("first"), nb::arg("gated"), nb::arg("out"),
        "One attention layer after its projections. Per sequence b, tokens[b] rows from rows[b] of "
        "q, k, v follow before[b] positions in the pages page_table[b]; k is overwritten.");
}

}  // namespace qnext
