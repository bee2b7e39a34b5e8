// The attention of the table of training kernels.
#pragma once

#include "training.h"

namespace qnext::QNEXT_ISA {

bool attention_forward(const AttentionCall& call);
bool attention_backward(const AttentionCall& call);

}  // namespace qnext::QNEXT_ISA
