// The row kernels for bfloat16 logits.
#include "rows.h"

template void kldiv::cuda::launch_rows<kldiv::cuda::DenseSide<kldiv::BFloat16>>(const DistillationArgs&, void*);
