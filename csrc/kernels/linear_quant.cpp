// Products with q8 and q4 matrices. A vector has one lane per row, so no sum crosses lanes: the
// integers of a block of 256 columns add exactly, in any order; then the blocks are added as floats
// in rising order. Every instruction set and every number of activations gives the same bits.
#include "linear_ints.h"
#include "linear_rows.h"

namespace qnext::QNEXT_ISA {
namespace {

// Vectors of rows and rows of activations that are computed together: their sums are registers.
#if defined(QNEXT_ISA_avx512)
constexpr int kVectors = 2, kTokens = 8, kFewSums = 8;
#elif defined(QNEXT_ISA_scalar)
constexpr int kVectors = 2, kTokens = 1, kFewSums = 0;
#else
constexpr int kVectors = 2, kTokens = 4, kFewSums = 4;
#endif
constexpr int kParts = static_cast<int>(kTileRows) / (kVectors * kLanes);

// Bytes to ask for while other work goes on, a few lines per group of columns: more at once would
// wait for each other.
struct Ahead {
  const uint8_t* at = nullptr;
  const uint8_t* end = nullptr;
  int64_t lines = 0;
  void ask() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// One panel: up to two tiles of W times a few rows of x.
struct Task {
  const QuantRow* at;
  const uint8_t* tile[2];  // bytes of the lines of weights
  const float* row_scale[2];
  const char* const* x;  // prepared rows
  float* const* out;     // of every row of x, at the first row of the tile
  int rows;              // of the tiles that exist
  Ahead ahead;
  int64_t far;  // bytes from a line of weights to the one that is asked for, where they stream
};

// The outputs lie far apart: without this every store would wait for memory at the end.
template <int T, int V>
void ask_for_outputs(const Task& task, int part) {
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < V * kLanes; r += 16) {
      __builtin_prefetch(task.out[t] + part * V * kLanes + r, 1, 3);
    }
  }
}

template <int T, int V>
void store(const Task& task, int part, const Floats (&sum)[V][T]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int r = (part * V + v) * kLanes;
      const int live = task.rows - r;
      if (live >= kLanes) {
        sum[v][t].store(task.out[t] + r);
      } else if (live > 0) {
        sum[v][t].store(task.out[t] + r, live);
      }
    }
  }
}

// Weights stream through a panel too fast for the processor's own prefetcher; ask for those this
// far ahead. Where they pass once they are not to stay in a cache: there is better use for it.
constexpr int64_t kAhead = 4096;
// Several rows of activations do so much between two lines that the processor itself sees less of
// what comes: farther then.
constexpr int64_t kSeveral = 5, kFarAhead = 8192;
// Small tiles are asked for whole, one or more ahead, and behind the last ones those of the product
// that follows: a small expert ends before a stream of its own has begun.
constexpr int64_t kSmallTile = 12 * 1024, kTilesAhead = 8 * 1024;
constexpr int kStays = kParts == 1 ? 0 : 3;
template <int lines>
inline void stream(const uint8_t* w, int64_t far) {
#pragma GCC unroll 16
  for (int i = 0; i < lines; ++i) __builtin_prefetch(w + far + i * 64, 0, kStays);
}

inline Floats scale_of(const char* x, int64_t scales, int64_t block) {
  float scale;
  memcpy(&scale, x + scales + block * 4, 4);
  return Floats::set(scale);
}

// Weights of one byte: q8 with its scales in front of every block, or an expanded q4.
template <int T, int V, bool kBlockScales, int64_t kGroup, bool kStream>
void panel_bytes(const Task& task, int part) {
  // Bytes of four activations; what else a group holds comes after its 16.
  constexpr int64_t kQuad = kGroup == kGroupQ4 ? 4 : kGroup / 4;
  constexpr int tiles = V * kLanes > kTileRows ? 2 : 1, per_tile = V / tiles;
  // Few rows have few sums, and each waits for its last addition: so every sum is several.
  constexpr int kChains = V * T > kFewSums ? 1 : V * T > 2 ? 2 : 4;
  const QuantRow& at = *task.at;
  Ahead ahead = task.ahead;
  const char* x[T];
  Floats sum[V][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    x[t] = task.x[t];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v][t] = Floats::zero();
  }
  const int row = part * V * kLanes;
  const uint8_t* w[tiles];
#pragma GCC unroll 2
  for (int i = 0; i < tiles; ++i) w[i] = task.tile[i] + row * 4;
  ask_for_outputs<T, V>(task, part);
  for (int64_t block = 0; block < at.blocks; ++block) {
    const uint8_t* d[tiles];
#pragma GCC unroll 2
    for (int i = 0; i < tiles; ++i) {
      d[i] = w[i];
      if (kBlockScales) w[i] += kTileRows * 4;
    }
    const int64_t first = block * 16;
    const int64_t end = first + 16 < at.groups ? first + 16 : at.groups;
    Ints acc[kChains][V][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[0][v][t] = everywhere(x[t] + at.starts + block * 4);
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) acc[c][v][t] = no_ints();
      }
    }
    for (int64_t group = first; group < end; ++group) {
      if (kStream && part == 0) stream<8>(w[0], task.far);
      ahead.ask();
      const int64_t k = group * kGroup;
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        Bytes b[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          b[v] = load_bytes(w[v / per_tile] + (v % per_tile) * kLanes * 4 + step * kTileRows * 4);
          hold(b[v]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const char* a = x[t] + k + step * kQuad;
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            acc[step % kChains][v][t] = dot4(acc[step % kChains][v][t], b[v], a);
          };
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < tiles; ++i) w[i] += kTileRows * 16;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Floats scale = scale_of(x[t], at.scales, block);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        Floats factor = scale;
        if (kBlockScales) {
          factor = factor * Floats::load(reinterpret_cast<const float*>(d[v / per_tile]) +
                                         (v % per_tile) * kLanes);
        }
        Ints all = acc[0][v][t];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) all = plus(all, acc[c][v][t]);
        sum[v][t] = fma(to_floats(all), factor, sum[v][t]);
      }
    }
  }
  if (!kBlockScales) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const float* r = task.row_scale[v / per_tile] + row + (v % per_tile) * kLanes;
        sum[v][t] = sum[v][t] * Floats::load(r);
      }
    }
  }
  store<T, V>(task, part, sum);
}

template <int T, bool kStream>
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
  const float* r = task.row_scale[0] + row;
  const uint8_t* w = task.tile[0];
  Ahead ahead = task.ahead;
  ask_for_outputs<T, kVectors>(task, part);
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
      if (kStream && part == 0) stream<9>(w, task.far);
      ahead.ask();
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
  store<T, kVectors>(task, part, sum);
}

template <int T, bool kStream>
void panel(Format format, const Task& task) {
  for (int part = 0; part < kParts; ++part) {
    if (part * kVectors * kLanes >= task.rows) break;
    if (format == Format::q8) {
      panel_bytes<T, kVectors, true, kGroupQ8, kStream>(task, part);
    } else {
      panel_q4<T, kStream>(task, part);
    }
  }
}

template <bool kStream>
void panel_of(int tokens, Format format, const Task& task) {
  if constexpr (kTokens >= 8) {
    if (tokens == 8) return panel<8, kStream>(format, task);
    if (tokens == 7) return panel<7, kStream>(format, task);
    if (tokens == 6) return panel<6, kStream>(format, task);
    if (tokens == 5) return panel<5, kStream>(format, task);
  }
  if constexpr (kTokens >= 4) {
    if (tokens == 4) return panel<4, kStream>(format, task);
    if (tokens == 3) return panel<3, kStream>(format, task);
    if (tokens == 2) return panel<2, kStream>(format, task);
  }
  panel<1, kStream>(format, task);
}

// The rows of x, what to multiply them with, and where results go.
struct Job {
  const Matrix& w;
  QuantRow at;
  const char* prepared;
  const int32_t* index;
  int64_t count;
  float* out;
  int64_t ldo;
  int64_t tile_bytes;
  int64_t tiles;        // where this product ends
  const uint8_t* next;  // what is read after it, or null

  const char* x(int64_t i) const { return prepared + (index ? index[i] : i) * at.stride; }
  const uint8_t* tile(int64_t number) const {
    return static_cast<const uint8_t*>(w.data) + number * tile_bytes;
  }
  int64_t far(int64_t number) const {
    if (tile_bytes > kSmallTile) return count < kSeveral ? kAhead : kFarAhead;
    const int64_t then = number + (kTilesAhead + tile_bytes - 1) / tile_bytes;
    if (then < tiles) return tile(then) - tile(number);
    return next ? next + (then - tiles) * tile_bytes - tile(number) : 0;
  }
};

// What a panel of many asks for: its part of the next tiles.
Ahead part_of(const uint8_t* next, int64_t bytes, int64_t panel, int64_t panels, int64_t times) {
  const int64_t lines = (bytes / 64 + panels * times - 1) / (panels * times);
  return {next + panel * times * lines * 64, next + bytes, lines};
}

// A tile times all activations, panel after panel; in the meantime the next tile is asked for.
void direct(const Job& job, int64_t tile, int rows, bool more) {
  const int64_t panels = (job.count + kTokens - 1) / kTokens;
  const int64_t header = job.w.format == Format::q4 ? kTileRows * 4 : 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t i0 = job.count * p / panels, i1 = job.count * (p + 1) / panels;
    const char* x[kTokens];
    float* out[kTokens];
    for (int64_t i = i0; i < i1; ++i) {
      x[i - i0] = job.x(i);
      out[i - i0] = job.out + i * job.ldo + tile * kTileRows;
    }
    const uint8_t* w = job.tile(tile);
    Task task = {&job.at, {w + header}, {reinterpret_cast<const float*>(w)}, x, out, rows, {},
                 job.far(tile)};
    const int tokens = static_cast<int>(i1 - i0);
    if (panels == 1) {
      panel_of<true>(tokens, job.w.format, task);
      return;
    }
    if (more) {
      const int64_t times = job.w.format == Format::q4 ? job.at.groups / 2 : job.at.groups;
      task.ahead = part_of(w + job.tile_bytes, job.tile_bytes, p, panels, times);
    }
    panel_of<false>(tokens, job.w.format, task);
  }
}

#if defined(QNEXT_ISA_avx512)

// From so many activations on, two tiles at once pay: each activation loaded serves twice the rows.
constexpr int64_t kManyQ8 = 9, kManyQ4 = 24;
constexpr int kWideTokens = 6;

// A q4 tile as bytes s * q + 128, in the order of q8: the same integers, so the same sums. A nibble
// is n = q + 8, and s n + (128 - 8 s) lies between 8 and 248: so one 16-bit product serves two of
// them, and neither reaches into the other.
void expand(const uint8_t* w, int64_t steps, uint8_t* to) {
  const __m512i twice = _mm512_broadcast_i32x4(
      _mm_set_epi8(13, 12, 13, 12, 9, 8, 9, 8, 5, 4, 5, 4, 1, 0, 1, 0));
  for (int64_t i = 0; i < steps; ++i) {
    for (int g = 0; g < 2; ++g) {
      for (int v = 0; v < 2; ++v) {
        const __m128i scales =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + g * kTileRows + v * kLanes));
        const __m512i s = _mm512_shuffle_epi8(_mm512_cvtepi8_epi32(scales), twice);
        const __m512i one = _mm512_sub_epi16(_mm512_set1_epi16(128), _mm512_slli_epi16(s, 3));
        const __m512i offset = _mm512_add_epi16(one, _mm512_slli_epi16(one, 8));
#pragma GCC unroll 2
        for (int line = 0; line < 2; ++line) {
          const Bytes b = load_bytes(w + kTileRows * (2 + 8 * g + 4 * line) + v * 64);
          uint8_t* at = to + (4 * g + 2 * line) * kTileRows * 4 + v * 64;
          _mm512_store_si512(at, _mm512_add_epi16(_mm512_mullo_epi16(low(b), s), offset));
          _mm512_store_si512(at + kTileRows * 4,
                             _mm512_add_epi16(_mm512_mullo_epi16(high(b), s), offset));
        }
      }
    }
    w += kTileRows * 18;
    to += kTileRows * 32;
  }
}

template <int T>
void wide_panel(Format format, const Task& task) {
  if (format == Format::q8) {
    panel_bytes<T, 4, true, kGroupQ8, false>(task, 0);
  } else {
    panel_bytes<T, 4, false, kGroupQ4, false>(task, 0);
  }
}

// Two tiles times many activations.
void wide(const Job& job, int64_t tile, int rows, bool more, uint8_t* scratch) {
  const bool q4 = job.w.format == Format::q4;
  const int64_t steps = job.at.groups / 2;
  const uint8_t* w[2] = {job.tile(tile), job.tile(tile + 1)};
  Task task = {&job.at, {w[0], w[1]}, {}, nullptr, nullptr, rows, {}, 0};
  if (q4) {
    const int64_t bytes = steps * 32 * kTileRows;
    for (int i = 0; i < 2; ++i) {
      task.row_scale[i] = reinterpret_cast<const float*>(w[i]);
      task.tile[i] = scratch + i * bytes;
      expand(w[i] + kTileRows * 4, steps, scratch + i * bytes);
    }
  }
  const int64_t panels = (job.count + kWideTokens - 1) / kWideTokens;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t i0 = job.count * p / panels, i1 = job.count * (p + 1) / panels;
    const char* x[kWideTokens];
    float* out[kWideTokens];
    for (int64_t i = i0; i < i1; ++i) {
      x[i - i0] = job.x(i);
      out[i - i0] = job.out + i * job.ldo + tile * kTileRows;
    }
    task.x = x;
    task.out = out;
    if (more) {
      task.ahead =
          part_of(w[1] + job.tile_bytes, 2 * job.tile_bytes, p, panels, job.at.groups);
    }
    switch (i1 - i0) {
      case 6: wide_panel<6>(job.w.format, task); break;
      case 5: wide_panel<5>(job.w.format, task); break;
      case 4: wide_panel<4>(job.w.format, task); break;
      default: wide_panel<3>(job.w.format, task); break;
    }
  }
}

bool use_wide(const Matrix& w, int64_t count) {
  return count >= (w.format == Format::q4 ? kManyQ4 : kManyQ8);
}

#endif

}  // namespace

int64_t quant_scratch_bytes([[maybe_unused]] const Matrix& w, [[maybe_unused]] int64_t count) {
#if defined(QNEXT_ISA_avx512)
  if (w.format == Format::q4 && use_wide(w, count)) return 2 * kTileRows * padded(w.cols);
#endif
  return 0;
}

void multiply_quant(const Matrix& w, const void* prepared, const int32_t* index, int64_t count,
                    float* out, int64_t ldo, int64_t first, int64_t last,
                    [[maybe_unused]] void* scratch, const void* next) {
  const int64_t tiles = (last + kTileRows - 1) / kTileRows;
  const int64_t tile_bytes = matrix_bytes(w.format, kTileRows, w.cols);
  const Job job = {w,     QuantRow(w.cols, w.format == Format::q4 ? kGroupQ4 : kGroupQ8),
                   static_cast<const char*>(prepared), index, count, out, ldo,
                   tile_bytes, tiles, static_cast<const uint8_t*>(next)};
  if (next && (count > kTokens || tile_bytes > kSmallTile)) ask_for_first(next);
  int64_t tile = first / kTileRows;
#if defined(QNEXT_ISA_avx512)
  if (use_wide(w, count)) {
    for (; tile + 2 <= tiles; tile += 2) {
      const int64_t live = last - tile * kTileRows;
      wide(job, tile, static_cast<int>(live < 64 ? live : 64), tile + 2 < tiles,
           static_cast<uint8_t*>(scratch));
    }
  }
#endif
  for (; tile < tiles; ++tile) {
    const int64_t live = last - tile * kTileRows;
    direct(job, tile, static_cast<int>(live < kTileRows ? live : kTileRows), tile + 1 < tiles);
  }
}

}  // namespace qnext::QNEXT_ISA
