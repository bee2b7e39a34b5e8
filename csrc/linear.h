// Products with a weight matrix, in four storage formats. docs/formats.md draws the layouts.
//
//   f32, bf16   row-major [rows][cols], as checkpoints store them: a mapped file is used in place.
//   q8          w = d[row, block] * q, q in -127..127, blocks of 256 columns, d float32. 8.125 bit.
//   q4          w = R[row] * s[row, group] * q, q in -8..7, s in -15..15, groups of 16 columns,
//               R float32, s and q integers: a block of 256 columns sums exactly. 4.5 bit.
//
// q8 and q4 are stored in tiles of 32 rows, one after another; a tile runs along the columns. Rows
// are padded to 32 and columns to 32 with zeros. Every piece starts on a 64-byte line; "line" below
// is 64 bytes, dword r of it belongs to row r (first line: rows 0-15, second: rows 16-31).
//   q8 tile: per block of 256 columns (the last may be shorter, a multiple of 32): 32 float d; then
//            per 4 columns two lines, byte i of dword r = q[r][k + i] + 128.
//   q4 tile: 32 float R; then per 32 columns: 32 int8 s of the first group, 32 int8 s of the
//            second, then per 8 columns two lines: byte i of dword r = (q[r][k + i] + 8) in the low
//            and (q[r][k + 4 + i] + 8) in the high nibble. 576 bytes per 32 columns.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "share.h"

namespace qnext {

enum class Format : int { f32 = 0, bf16 = 1, q8 = 2, q4 = 3 };

constexpr int64_t kTileRows = 32;
constexpr int64_t kBlock = 256;  // columns that share one activation scale

struct Matrix {
  Format format = Format::f32;
  int64_t rows = 0;  // outputs
  int64_t cols = 0;  // inputs
  const void* data = nullptr;
};

// Bytes of a matrix in its format; 64-byte aligned for q8 and q4.
constexpr int64_t matrix_bytes(Format format, int64_t rows, int64_t cols) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t wide = (cols + 31) / 32 * 32;
  switch (format) {
    case Format::f32: return rows * cols * 4;
    case Format::bf16: return rows * cols * 2;
    case Format::q8: return tiles * ((wide + kBlock - 1) / kBlock * 128 + wide * kTileRows);
    default: return tiles * (128 + wide / 32 * 576);
  }
}

struct LinearKernels {
  // Bytes of `count` rows of activations prepared for matrices of a format.
  int64_t (*prepared_bytes)(Format format, int64_t count, int64_t cols);

  // Prepare the team's share of the rows x [count][cols] (row stride ldx floats): a float32 copy, a
  // bf16 copy, or int8 with one float scale per block of 256 columns (amax / 127, round to nearest
  // even) and the integer sums the kernels need. A non-finite value makes its row's products NaN.
  // The caller puts a barrier before the first multiply.
  void (*prepare)(Format format, const float* x, int64_t ldx, int64_t count, int64_t cols,
                  void* prepared, const Team& team);

  // Bytes one thread needs as scratch in multiply.
  int64_t (*scratch_bytes)(const Matrix& w, int64_t count);

  // out[i][r] = sum_c W[r][c] x[index[i]][c] for i < count and first <= r < last; index null means
  // the identity. `prepared_rows` is the count given to prepare. first and last are multiples of 32
  // (or rows). ldo is the row stride of out in floats; scratch is this thread's. `next`: what this
  // thread reads after it, whose beginning is asked for meanwhile; or null.
  // A result depends on its row of W and its row of x alone: not on count, index or the threads.
  void (*multiply)(const Matrix& w, const void* prepared, int64_t prepared_rows,
                   const int32_t* index, int64_t count, float* out, int64_t ldo, int64_t first,
                   int64_t last, void* scratch, const void* next);
};

QNEXT_FAMILY(LinearKernels, linear_kernels)

}  // namespace qnext
