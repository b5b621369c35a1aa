// The CPU kernels, compiled for portable.
#include "walk.h"

namespace kldiv::cpu {
const Kernels portable_kernels = KLDIV_KERNELS("portable");
}
