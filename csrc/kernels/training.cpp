// The table of training kernels of one instruction set.
#include "training.h"

#include "training_attention.h"
#include "training_delta.h"
#include "training_experts.h"

namespace qnext::QNEXT_ISA {

const TrainingKernels training_kernels = {experts_forward, experts_backward, delta_forward,
                                          delta_backward, attention_forward, attention_backward};

}  // namespace qnext::QNEXT_ISA
