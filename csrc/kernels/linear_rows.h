// How rows of activations wait for a product: the layouts `prepare` writes and the kernels read.
#pragma once

#include "../linear.h"
#include "simd.h"

namespace qnext::QNEXT_ISA {

// Rows start an odd number of cache lines apart, so that many of them fit a cache set by set.
constexpr int64_t odd_lines(int64_t bytes) {
  const int64_t lines = (bytes + 63) / 64;
  return (lines | 1) * 64;
}

constexpr int64_t padded(int64_t cols) { return (cols + 31) / 32 * 32; }

// f32: floats. bf16: what the dot product of the instruction set takes; zeros up to 32 columns.
#if defined(QNEXT_ISA_avx512)
using Bf16Input = bf16;
#else
using Bf16Input = float;  // rounded to bf16
#endif

// q8 and q4: groups of 16 columns, then one float scale per block of 256 columns, then per block
// the integer from which its sum starts: -128 times the sum of its activations, because weights
// are stored 128 too large.
struct QuantRow {
  int64_t groups;  // of 16 columns, even
  int64_t blocks;
  int64_t scales;  // byte offsets
  int64_t starts;
  int64_t stride;

  constexpr QuantRow(int64_t cols, int64_t group_bytes)
      : groups(padded(cols) / 16),
        blocks((groups + 15) / 16),
        scales(groups * group_bytes),
        starts(scales + blocks * 4),
        stride(odd_lines(starts + blocks * 4)) {}
};

// A group for q4: 16 int8, then the int32 from which the sum of the group starts, -8 times the sum
// of its activations (nibbles are stored 8 too large).
constexpr int64_t kGroupQ4 = 20;

// A group for q8: 16 int8. Without VNNI: per 4 columns the int16 of columns 0, 2, 1, 3, because
// products of 8-bit numbers overflow the 16 bits that vpmaddubsw has.
#if defined(QNEXT_ISA_avx2)
constexpr int64_t kGroupQ8 = 32;
#else
constexpr int64_t kGroupQ8 = 16;
#endif

// A stream of weights starts slowly: its beginning is asked for while the one before it runs.
static inline void ask_for_first(const void* next) {
  constexpr int64_t kFirstLines = 64;
  for (int64_t i = 0; i < kFirstLines; ++i) {
    __builtin_prefetch(static_cast<const char*>(next) + i * 64, 0, 2);
  }
}

// The parts of `multiply`, one per kind of weights.
void multiply_dense(const Matrix& w, const void* prepared, const int32_t* index, int64_t count,
                    float* out, int64_t ldo, int64_t first, int64_t last);
void multiply_quant(const Matrix& w, const void* prepared, const int32_t* index, int64_t count,
                    float* out, int64_t ldo, int64_t first, int64_t last, void* scratch,
                    const void* next);
int64_t quant_scratch_bytes(const Matrix& w, int64_t count);

}  // namespace qnext::QNEXT_ISA
