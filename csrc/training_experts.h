// Experts of the table of training kernels, and what a whole sparse layer needs of them.
#pragma once

#include "training.h"

namespace qnext::QNEXT_ISA {

bool experts_forward(const ExpertsCall& call);
bool experts_backward(const ExpertsCall& call);

// The same without the last rounding: y or d_h as float32 sums [tokens][width].
bool experts_forward_sums(const ExpertsCall& call, float* sums);
bool experts_backward_sums(const ExpertsCall& call, float* sums);
// sums, plus `more` (of that number) if it is not null, rounded to it.
void round_sums(Number number, const float* sums, const void* more, int64_t count, void* out);

}  // namespace qnext::QNEXT_ISA
