// Routers, and layers of experts behind one, of the table of training kernels.
#pragma once

#include "training.h"

namespace qnext::QNEXT_ISA {

void route_forward(const RouteCall& call);
void route_backward(const RouteCall& call);
bool load_forward(const LoadCall& call);
void load_backward(const LoadCall& call);
bool sparse_forward(const SparseCall& call);
bool sparse_backward(const SparseCall& call);

}  // namespace qnext::QNEXT_ISA
