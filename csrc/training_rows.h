// Work on single rows and numbers of the table of training kernels.
#pragma once

#include "training.h"

namespace qnext::QNEXT_ISA {

void norm_forward(const NormCall& call);
bool norm_backward(const NormCall& call);
void cross_entropy(const CrossEntropyCall& call);
void adam(const AdamCall& call);

}  // namespace qnext::QNEXT_ISA
