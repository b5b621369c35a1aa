// The CPU kernels, compiled for avx512.
#define KLDIV_ISA avx512
#define KLDIV_VECTOR_BYTES 64
#include "kernels.h"

#if defined(KLDIV_HAS_X86_KERNELS)
// The standard headers come first: the pragma is for our own functions alone.
#include <memory>
#include <string_view>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "walk.h"

namespace kldiv::cpu {
const Kernels avx512_kernels = KLDIV_KERNELS("avx512");
}
#endif
