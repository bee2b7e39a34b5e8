// What this machine can do at best: bytes read per second, products per second.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace qnext {

struct ProbeKernels {
  // Read all bytes (a multiple of 512) in eight streams, as fast as loads go. Returns a mixture of
  // them, so that no compiler leaves the reading out.
  int64_t (*read)(const void* data, int64_t bytes);

  // Multiply and add from registers, `turns` times; returns the number of operations (a product and
  // its addition are two). The sums are written to `sink`, of 64 floats.
  int64_t (*int8)(int64_t turns, void* sink);
  int64_t (*bf16)(int64_t turns, void* sink);
};

QNEXT_FAMILY(ProbeKernels, probe_kernels)

}  // namespace qnext
