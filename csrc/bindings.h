// What the files of bindings share: the pool, and how tensors arrive.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>

#include "isa.h"
#include "threads.h"

namespace qnext {

namespace nb = nanobind;

// Contiguous CPU arrays; None is refused unless the binding says so.
template <typename T>
using Array = nb::ndarray<T, nb::device::cpu, nb::c_contig>;

// The process's pool; `set_threads` replaces it. Never nested with PyTorch's.
ThreadPool& pool();

// One function per family of kernels registers what Python may call.
void bind_attention(nb::module_& m);
void bind_gated_delta(nb::module_& m);
void bind_norm(nb::module_& m);
void bind_moe(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_probe(nb::module_& m);
void bind_round(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_lane(nb::module_& m);
void bind_training(nb::module_& m);

}  // namespace qnext
