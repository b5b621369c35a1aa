// The row kernels for float64 logits.
#include "rows.h"

template void kldiv::cuda::launch_rows<kldiv::cuda::DenseSide<double>>(const DistillationArgs&, void*);
