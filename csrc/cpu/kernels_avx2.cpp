// The CPU kernels, compiled for avx2.
#define KLDIV_ISA avx2
#define KLDIV_VECTOR_BYTES 32
#include "kernels.h"

#if defined(KLDIV_HAS_X86_KERNELS)
// The standard headers come first: the pragma is for our own functions alone.
#include <memory>
#include <string_view>

#pragma GCC target("avx2,fma")
#include "walk.h"

namespace kldiv::cpu {
const Kernels avx2_kernels = KLDIV_KERNELS("avx2");
}
#endif
