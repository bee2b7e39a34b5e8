// What a step works on beside the weights and the cache: its buffers, its products, and what a
// waiting thread asks memory for. Of decoder.cpp and feed_forward.cpp alone.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "decoder.h"
#include "moe.h"
#include "norm.h"

namespace qnext {

constexpr int kFormats = 4;
constexpr int64_t kLargePage = 2 << 20;
// What a waiting thread asks for at most: it stays in the second-level cache until it is read.
constexpr int64_t kSoonBytes = 128 * 1024;

// Memory on 64-byte lines that only grows. Its content is undefined after growing. Large ones ask
// for large pages: looking up small ones takes time.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      const int64_t page = bytes >= kLargePage ? kLargePage : 4096;
      size_ = (bytes + page - 1) / page * page;
      data_ = std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
#if defined(__linux__)
      if (page == kLargePage) madvise(data_, static_cast<size_t>(size_), MADV_HUGEPAGE);
#endif
    }
    return data_;
  }
  float* floats(int64_t count) { return static_cast<float*>(reserve(count * 4)); }
  int32_t* ints(int64_t count) { return static_cast<int32_t*>(reserve(count * 4)); }
  int64_t bytes() const { return size_; }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

inline unsigned bit(const Matrix& w) { return w.rows ? 1u << static_cast<int>(w.format) : 0u; }

inline unsigned bits(const FeedForward& f) { return bit(f.gate_up) | bit(f.gate) | bit(f.up); }

// Where row `first` begins; for packed matrices a multiple of 32.
inline const uint8_t* row_at(const Matrix& w, int64_t first) {
  return static_cast<const uint8_t*>(w.data) + matrix_bytes(w.format, first, w.cols);
}

// A part of a row-major matrix, or whole tiles of a packed one.
inline Matrix rows_of(const Matrix& w, int64_t first, int64_t count) {
  Matrix part = w;
  part.rows = count;
  part.data = row_at(w, first);
  return part;
}

// What this thread reads next begins there.
inline void read_soon(const void* at, Team& team) {
  if (at) team.soon = {reinterpret_cast<uintptr_t>(at), reinterpret_cast<uintptr_t>(at) + kSoonBytes};
}

// Its share of the rows of a matrix is what it reads next.
inline const uint8_t* share_at(const Matrix& w, int64_t grain, const Team& team) {
  if (!w.rows) return nullptr;
  int64_t first, last;
  team.range(w.rows, grain, &first, &last);
  return row_at(w, first);
}

// A layer begins with its projections.
inline const uint8_t* share_at(const Layer& layer, const Team& team) {
  return share_at(layer.is_attention ? layer.q : layer.qkvz, kTileRows, team);
}

// Where tile `first` of gate and up begins.
inline const uint8_t* gate_up_at(const FeedForward& ff, int64_t first) {
  if (!ff.width) return nullptr;
  if (ff.gate_up.rows && ff.gate_up.format >= Format::q8) {
    return row_at(ff.gate_up, 2 * first * kTileRows);
  }
  return row_at(ff.gate_up.rows ? ff.gate_up : ff.gate, first * kTileRows);
}

// Everything a step needs beside the weights and the cache.
struct Decoder::Work {
  Buffer h, normed, projected, small, keys, values, mixed, cos, sin, pair;
  Buffer gathered, router, ids, weights, act, shared_act, shared_weight;
  Buffer prepared[kFormats], prepared_act[kFormats], prepared_shared[kFormats];
  std::vector<Buffer> scratch, local;
  std::vector<int32_t> start, token, identity, active;
  std::vector<float> pair_weight;
  Counter counter;
  std::vector<DeltaSequence> delta_sequences;
  std::vector<DeltaCapture> delta_captures;
  std::vector<AttentionSequence> attention_sequences;
  Buffer attention_scratch;
  const DeltaKernels* delta = nullptr;
  const AttentionKernels* attention = nullptr;
  const LinearKernels* linear = nullptr;
  const NormKernels* norm = nullptr;
  const MoeKernels* moe = nullptr;

  // Prepare rows for every format in the mask. Barriers before (the rows) and after (the result).
  void prepare(unsigned formats, const float* x, int64_t count, int64_t cols, Buffer* into,
               Team& team) {
    for (int f = 0; f < kFormats; ++f) {
      if (!(formats >> f & 1)) continue;
      const Format format = static_cast<Format>(f);
      linear->prepare(format, x, cols, count, cols, into[f].reserve(0), team);
    }
    team.barrier();
  }

  const void* for_matrix(const Matrix& w, Buffer* from) {
    return from[static_cast<int>(w.format)].reserve(0);
  }

  // out[:, r] for this thread's share of the rows of w.
  void multiply(const Matrix& w, int64_t rows, float* out, int64_t ldo, Team& team,
                const Matrix* then = nullptr) {
    int64_t first, last;
    team.range(w.rows, kTileRows, &first, &last);
    multiply_part(w, prepared, rows, nullptr, rows, out, ldo, first, last, team,
                  then ? share_at(*then, kTileRows, team) : nullptr);
  }

  void multiply_part(const Matrix& w, Buffer* from, int64_t prepared_rows, const int32_t* index,
                     int64_t count, float* out, int64_t ldo, int64_t first, int64_t last,
                     Team& team, const void* next = nullptr) {
    if (first >= last || !count) return;
    void* space = scratch[team.thread].reserve(linear->scratch_bytes(w, count));
    linear->multiply(w, for_matrix(w, from), prepared_rows, index, count, out, ldo, first, last,
                     space, next);
  }

  // act[i][32 * tile ...] = silu(gate x) * (up x) for tiles [first, last) of one feed-forward.
  void gate_up(const FeedForward& ff, int64_t rows, const int32_t* index, int64_t count,
               float* act_out, int64_t first, int64_t last, Team& team,
               const void* next = nullptr) {
    if (first >= last || !count) return;
    const int64_t begin = first * kTileRows;
    const int64_t end = last * kTileRows < ff.width ? last * kTileRows : ff.width;
    if (ff.gate_up.rows && ff.gate_up.format >= Format::q8) {
      // Tiles alternate: 32 rows of gate, the same 32 of up.
      const int64_t wide = 2 * (last - first) * kTileRows;
      float* both = local[team.thread].floats(count * wide);
      multiply_part(ff.gate_up, prepared, rows, index, count, both - first * 2 * kTileRows, wide,
                    first * 2 * kTileRows, last * 2 * kTileRows, team, next);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t f = tile * kTileRows;
        const int64_t width = ff.width - f < kTileRows ? ff.width - f : kTileRows;
        const float* gate = both + (tile - first) * 2 * kTileRows;
        moe->silu_multiply(gate, gate + kTileRows, count, wide, width, act_out + f, ff.width);
      }
      return;
    }
    const int64_t wide = end - begin;
    float* gate = local[team.thread].floats(2 * count * wide);
    float* up = gate + count * wide;
    const Matrix gate_w = ff.gate_up.rows ? rows_of(ff.gate_up, 0, ff.width) : ff.gate;
    const Matrix up_w = ff.gate_up.rows ? rows_of(ff.gate_up, ff.width, ff.width) : ff.up;
    multiply_part(gate_w, prepared, rows, index, count, gate - begin, wide, begin, end, team,
                  row_at(up_w, begin));
    multiply_part(up_w, prepared, rows, index, count, up - begin, wide, begin, end, team, next);
    moe->silu_multiply(gate, up, count, wide, wide, act_out + begin, ff.width);
  }
};

}  // namespace qnext
