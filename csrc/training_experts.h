// The routed experts of the table of training kernels.
#pragma once

#include "training.h"

namespace qnext::QNEXT_ISA {

bool experts_forward(const ExpertsCall& call);
bool experts_backward(const ExpertsCall& call);

}  // namespace qnext::QNEXT_ISA
