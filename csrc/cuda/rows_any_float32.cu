// The row kernels that compute in float32, for logits of two dtypes or whose columns do not lie side by side.
#include "rows.h"

template void kldiv::cuda::launch_rows<kldiv::cuda::AnySide<float>>(const DistillationArgs&, void*);
