// The row kernels for float32 logits.
#include "rows.h"

template void kldiv::cuda::launch_rows<kldiv::cuda::DenseSide<float>>(const DistillationArgs&, void*);
