// Which integers stand for a weight best: the search of src/qnext/weights/rounding.py, made fast.
// Every sum runs in a fixed order, so all instruction sets and thread counts give the same bits.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "share.h"

namespace qnext {

constexpr int kGroup = 16;    // columns that share s in q4
constexpr int kRange = 256;   // columns that share d in q8

struct RoundKernels {
  // w [rows][cols] -> R [rows], s [rows][ceil(cols / 16)], q [rows][cols] for the team's share of
  // the rows. importance [cols] weighs the squared error of the columns; null means all alike.
  void (*q4)(const float* w, int64_t rows, int64_t cols, const float* importance, float* R,
             int8_t* s, int8_t* q, const Team& team);

  // w [rows][cols] -> d [rows][ceil(cols / 256)], q [rows][cols].
  void (*q8)(const float* w, int64_t rows, int64_t cols, const float* importance, float* d,
             int8_t* q, const Team& team);
};

QNEXT_FAMILY(RoundKernels, round_kernels)

}  // namespace qnext
