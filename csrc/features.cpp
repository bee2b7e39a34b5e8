// What this processor can run. Compiled without instruction-set flags.
#include "isa.h"

#include <atomic>

namespace qnext {

Isa best_isa() {
#ifdef __x86_64__
  // The compiler's check asks the processor and whether the operating system saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx512) return Isa::avx512;
  if (avx2) {
    // Older compilers do not know the name "avxvnni": ask CPUID leaf 7, subleaf 1, EAX bit 4.
    unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return (eax >> 4) & 1 ? Isa::avx2vnni : Isa::avx2;
  }
#endif
  return Isa::scalar;
}

namespace {
std::atomic<int> chosen{-1};
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(best_isa());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(Isa isa) { chosen.store(static_cast<int>(isa), std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2vnni: return "avx2vnni";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

}  // namespace qnext
