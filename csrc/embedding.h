// Rows of a matrix in any format, looked up by number.
#pragma once

#include "linear.h"

namespace qnext {

// Columns [first, last) of one row as floats: out[first] to out[last - 1].
void read_row(const Matrix& w, int64_t row, int64_t first, int64_t last, float* out);

// The embeddings of tokens [count][cols] (row stride ldo floats), this thread's share of them:
// blocks of columns, so that one token is shared too.
void embed(const Matrix& w, const int32_t* ids, int64_t count, float* out, int64_t ldo,
           const Team& team);

}  // namespace qnext
