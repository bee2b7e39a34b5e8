// Products with q8 and q4 matrices. A vector has one lane per row, so no sum crosses lanes: the
// integers of a block of 256 columns add exactly, in any order; then the blocks are added as floats
// in rising order. Every instruction set and every number of activations gives the same bits.
#include "linear_ints.h"
#include "linear_rows.h"

namespace qnext::QNEXT_ISA {
namespace {

// Vectors and activations that are computed together: their sums are registers.
#if defined(QNEXT_ISA_avx512)
constexpr int kVectors = 2, kTokens = 8;
#elif defined(QNEXT_ISA_scalar)
constexpr int kVectors = 2, kTokens = 1;
#else
constexpr int kVectors = 2, kTokens = 4;
#endif
constexpr int kParts = static_cast<int>(kTileRows) / (kVectors * kLanes);

struct Task {
  const uint8_t* tile;
  const QuantRow* at;
  const char* const* x;  // prepared rows
  float* const* out;     // row i of the outputs, at the first row of the tile
  int rows;              // of the tile that exist
};

template <int T>
void store(const Task& task, int part, const Floats (*sum)[T]) {
  for (int t = 0; t < T; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      const int r = (part * kVectors + v) * kLanes;
      const int live = task.rows - r;
      if (live >= kLanes) {
        sum[v][t].store(task.out[t] + r);
      } else if (live > 0) {
        sum[v][t].store(task.out[t] + r, live);
      }
    }
  }
}

inline Floats scale_of(const char* x, int64_t scales, int64_t block) {
  float scale;
  memcpy(&scale, x + scales + block * 4, 4);
  return Floats::set(scale);
}

template <int T>
void panel_q8(const Task& task, int part) {
  const QuantRow& at = *task.at;
  const char* x[T];
  Floats sum[kVectors][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    x[t] = task.x[t];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v][t] = Floats::zero();
  }
  const uint8_t* w = task.tile + part * kVectors * kLanes * 4;
  for (int64_t block = 0; block < at.blocks; ++block) {
    const float* d = reinterpret_cast<const float*>(w);
    w += kTileRows * 4;
    const int64_t first = block * 16;
    const int64_t end = first + 16 < at.groups ? first + 16 : at.groups;
    Ints acc[kVectors][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[v][t] = everywhere(x[t] + at.starts + block * 4);
    }
    for (int64_t k = first * kGroupQ8; k < end * kGroupQ8; k += kGroupQ8) {
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        Bytes b[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) b[v] = load_bytes(w + v * kLanes * 4);
        w += kTileRows * 4;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            acc[v][t] = dot4(acc[v][t], b[v], x[t] + k + step * (kGroupQ8 / 4));
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Floats scale = scale_of(x[t], at.scales, block);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[v][t] = fma(to_floats(acc[v][t]), scale * Floats::load(d + v * kLanes), sum[v][t]);
      }
    }
  }
  store<T>(task, part, sum);
}

template <int T>
void panel_q4(const Task& task, int part) {
  const QuantRow& at = *task.at;
  const char* x[T];
  Floats sum[kVectors][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    x[t] = task.x[t];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v][t] = Floats::zero();
  }
  const int row = part * kVectors * kLanes;
  const float* r = reinterpret_cast<const float*>(task.tile) + row;
  const uint8_t* w = task.tile + kTileRows * 4;
  for (int64_t block = 0; block < at.blocks; ++block) {
    const int64_t first = block * 16;
    const int64_t end = first + 16 < at.groups ? first + 16 : at.groups;
    Ints acc[kVectors][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[v][t] = no_ints();
    }
    for (int64_t group = first; group < end; group += 2) {
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        const uint8_t* lines = w + kTileRows * 2 + g * kTileRows * 8 + row * 4;
        Scales s[kVectors];
        Bytes b[4][kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          s[v] = load_scales(w + g * kTileRows + row + v * kLanes);
          const Bytes b0 = load_bytes(lines + v * kLanes * 4);
          const Bytes b1 = load_bytes(lines + kTileRows * 4 + v * kLanes * 4);
          b[0][v] = low(b0);
          b[1][v] = high(b0);
          b[2][v] = low(b1);
          b[3][v] = high(b1);
        }
        const int64_t k = (group + g) * kGroupQ4;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          Ints part_sum[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) part_sum[v] = everywhere(x[t] + k + 16);
#pragma GCC unroll 4
          for (int step = 0; step < 4; ++step) {
            const Ints a = everywhere(x[t] + k + step * 4);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) part_sum[v] = group4(part_sum[v], b[step][v], a);
          }
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) acc[v][t] = scaled(acc[v][t], part_sum[v], s[v]);
        }
      }
      w += kTileRows * 18;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Floats scale = scale_of(x[t], at.scales, block);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[v][t] = fma(to_floats(acc[v][t]), scale, sum[v][t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v][t] = sum[v][t] * Floats::load(r + v * kLanes);
  }
  store<T>(task, part, sum);
}

template <int T>
void panel(Format format, const Task& task) {
  for (int part = 0; part < kParts; ++part) {
    if (part * kVectors * kLanes >= task.rows) break;
    if (format == Format::q8) {
      panel_q8<T>(task, part);
    } else {
      panel_q4<T>(task, part);
    }
  }
}

void panel_of(int tokens, Format format, const Task& task) {
  if constexpr (kTokens >= 8) {
    if (tokens == 8) return panel<8>(format, task);
    if (tokens == 7) return panel<7>(format, task);
    if (tokens == 6) return panel<6>(format, task);
    if (tokens == 5) return panel<5>(format, task);
  }
  if constexpr (kTokens >= 4) {
    if (tokens == 4) return panel<4>(format, task);
    if (tokens == 3) return panel<3>(format, task);
    if (tokens == 2) return panel<2>(format, task);
  }
  panel<1>(format, task);
}

}  // namespace

int64_t quant_scratch_bytes(const Matrix&, int64_t) { return 0; }

void multiply_quant(const Matrix& w, const void* prepared, const int32_t* index, int64_t count,
                    float* out, int64_t ldo, int64_t first, int64_t last, void*) {
  const QuantRow at(w.cols, w.format == Format::q4 ? kGroupQ4 : kGroupQ8);
  const int64_t tile_bytes = matrix_bytes(w.format, kTileRows, w.cols);
  const char* rows = static_cast<const char*>(prepared);
  // As many tiles as stay in the second-level cache while all activations pass.
  int64_t strip = count > kTokens ? 256 * 1024 / tile_bytes : 1;
  if (strip < 1) strip = 1;
  const int64_t tiles = (last + kTileRows - 1) / kTileRows;
  const int64_t panels = (count + kTokens - 1) / kTokens;
  for (int64_t tile0 = first / kTileRows; tile0 < tiles; tile0 += strip) {
    const int64_t tile1 = tile0 + strip < tiles ? tile0 + strip : tiles;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t i0 = count * p / panels, i1 = count * (p + 1) / panels;
      const char* x[kTokens];
      float* to[kTokens];
      for (int64_t i = i0; i < i1; ++i) {
        x[i - i0] = rows + (index ? index[i] : i) * at.stride;
      }
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t r = tile * kTileRows;
        for (int64_t i = i0; i < i1; ++i) to[i - i0] = out + i * ldo + r;
        const int64_t live = last - r < kTileRows ? last - r : kTileRows;
        const Task task = {static_cast<const uint8_t*>(w.data) + tile * tile_bytes, &at, x, to,
                           static_cast<int>(live)};
        panel_of(static_cast<int>(i1 - i0), w.format, task);
      }
    }
  }
}

}  // namespace qnext::QNEXT_ISA
