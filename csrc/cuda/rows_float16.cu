// The row kernels for float16 logits.
#include "rows.h"

template void kldiv::cuda::launch_rows<kldiv::cuda::DenseSide<kldiv::Float16>>(const DistillationArgs&, void*);
