// Products with a weight matrix, for tests and measurements: the decoder's steps call the kernels
// without Python.
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "linear.h"

namespace qnext {
namespace {

// A buffer that only grows, kept between calls.
class Room {
 public:
  ~Room() { std::free(data_); }
  char* at_least(size_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(4096, bytes_));
      if (!data_) {
        bytes_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

std::mutex busy;
Room prepared_room, scratch_room;

Format format_of(const std::string& name) {
  if (name == "f32") return Format::f32;
  if (name == "bf16") return Format::bf16;
  if (name == "q8") return Format::q8;
  if (name == "q4") return Format::q4;
  throw nb::value_error("format: expected f32, bf16, q8 or q4.");
}

void require(bool fine, const char* message) {
  if (!fine) throw nb::value_error(message);
}

void linear(const std::string& format, Array<const uint8_t> data, Array<const float> x,
            std::optional<Array<const int32_t>> index, Array<float> out, int64_t first,
            int64_t last) {
  require(x.ndim() == 2 && out.ndim() == 2, "x and out: expected two dimensions.");
  const int64_t count = static_cast<int64_t>(x.shape(0)), n = static_cast<int64_t>(out.shape(0));
  const Matrix w{format_of(format), static_cast<int64_t>(out.shape(1)),
                 static_cast<int64_t>(x.shape(1)), data.data()};
  require(static_cast<int64_t>(data.size()) == matrix_bytes(w.format, w.rows, w.cols),
          "data: expected exactly the bytes of a matrix [out.shape[1], x.shape[1]].");
  const size_t align = w.format == Format::f32 ? 4 : w.format == Format::bf16 ? 2 : 64;
  require(reinterpret_cast<uintptr_t>(w.data) % align == 0, "data: not aligned for its format.");
  if (last < 0) last = w.rows;
  require(first >= 0 && first % kTileRows == 0 && last <= w.rows &&
              (last % kTileRows == 0 || last == w.rows),
          "first, last: expected multiples of 32 inside the rows.");
  const int32_t* rows = nullptr;
  if (index) {
    require(static_cast<int64_t>(index->size()) == n, "index: expected one entry per row of out.");
    rows = index->data();
    for (int64_t i = 0; i < n; ++i) {
      require(rows[i] >= 0 && rows[i] < count, "index: an entry is outside the rows of x.");
    }
  } else {
    require(count == n, "out: expected as many rows as x.");
  }
  const LinearKernels& kernels = linear_kernels(current_isa());
  nb::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(busy);
  void* prepared =
      prepared_room.at_least(static_cast<size_t>(kernels.prepared_bytes(w.format, count, w.cols)));
  const int64_t bytes = (kernels.scratch_bytes(w, n) + 63) / 64 * 64;
  char* scratch = scratch_room.at_least(static_cast<size_t>(bytes * pool().threads()));
  pool().run([&](Team& team) {
    kernels.prepare(w.format, x.data(), w.cols, count, w.cols, prepared, team);
    team.barrier();
    int64_t begin, end;
    team.range(last - first, kTileRows, &begin, &end);
    kernels.multiply(w, prepared, count, rows, n, out.data(), w.rows, first + begin, first + end,
                     scratch + bytes * team.thread, nullptr);
  });
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def(
      "matrix_bytes",
      [](const std::string& format, int64_t rows, int64_t cols) {
        return matrix_bytes(format_of(format), rows, cols);
      },
      nb::arg("format"), nb::arg("rows"), nb::arg("cols"));
  m.def("linear", &linear, nb::arg("format"), nb::arg("data"), nb::arg("x"),
        nb::arg("index").none(), nb::arg("out"), nb::arg("first") = 0, nb::arg("last") = -1,
        "x [n, cols] times the rows first..last of a matrix -> out [len(index) or n, rows].");
}

}  // namespace qnext
