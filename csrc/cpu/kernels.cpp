// Chooses the instruction set at run time.
#include "kernels.h"

#include <cstdlib>
#include <string_view>

namespace kldiv::cpu {
namespace {

const Kernels& choose() {
#if defined(KLDIV_HAS_X86_KERNELS)
  const char* variable = std::getenv("KLDIV_EXT_CPU_ISA");
  const std::string_view wanted = variable && *variable ? variable : "avx512";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted == "avx512") return avx512_kernels;
  if (avx2 && wanted != "portable") return avx2_kernels;
#endif
  return portable_kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace kldiv::cpu
