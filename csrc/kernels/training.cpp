// The table of training kernels of one instruction set.
#include "training.h"

#include "training_attention.h"
#include "training_delta.h"
#include "training_experts.h"
#include "training_rows.h"
#include "training_sparse.h"

namespace qnext::QNEXT_ISA {

const TrainingKernels training_kernels = {
    experts_forward,   experts_backward,   sparse_forward, sparse_backward, delta_forward,
    delta_backward,    attention_forward,  attention_backward, norm_forward, norm_backward,
    route_forward,     route_backward,     load_forward,   load_backward,   cross_entropy,
    adam};

}  // namespace qnext::QNEXT_ISA
