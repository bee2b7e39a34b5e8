// Instruction sets the kernels are compiled for, and which one runs.
#pragma once

namespace qnext {

// In rising order; each level can run everything below it.
enum class Isa : int { scalar = 0, avx2 = 1, avx2vnni = 2, avx512 = 3 };

// The best level this processor and operating system can run.
Isa best_isa();

// The level in use: the best one unless `set_isa` lowered it.
Isa current_isa();

// Lower (or restore) the level; the caller has checked that it is at most best_isa().
void set_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace qnext

// Families of kernels are tables of functions, one table per level:
//   QNEXT_FAMILY(NormKernels, norm_kernels)
// declares qnext::<isa>::norm_kernels for every level (defined in csrc/kernels/*.cpp, which are
// compiled once per level) and a function qnext::norm_kernels(Isa) that picks one.
#ifdef __x86_64__
#define QNEXT_FAMILY(Table, name)                            \
  namespace scalar { extern const Table name; }              \
  namespace avx2 { extern const Table name; }                \
  namespace avx2vnni { extern const Table name; }            \
  namespace avx512 { extern const Table name; }              \
  inline const Table& name(Isa isa) {                        \
    switch (isa) {                                           \
      case Isa::avx512: return avx512::name;                 \
      case Isa::avx2vnni: return avx2vnni::name;             \
      case Isa::avx2: return avx2::name;                     \
      default: return scalar::name;                          \
    }                                                        \
  }
#else
#define QNEXT_FAMILY(Table, name)                            \
  namespace scalar { extern const Table name; }              \
  inline const Table& name(Isa) { return scalar::name; }
#endif
