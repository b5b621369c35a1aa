// The CUDA kernels' entry points.
//
// All pointers in the arguments are device pointers. Nothing here waits for the device or throws; an error of a
// launch is left for cudaGetLastError().
#pragma once

#include "../args.h"

namespace kldiv::cuda {

void distillation(const DistillationArgs& args, void* stream);
void token_stats(const TokenStatsArgs& args, void* stream);
void pointwise(const PointwiseArgs& args, void* stream);
void scale(const ScaleArgs& args, void* stream);

// How many bytes DistillationArgs::scratch has to have on the current device.
int64_t distillation_scratch(int64_t columns);

// How long PointwiseArgs::partials has to be.
int64_t pointwise_partials(int64_t rows, int64_t columns);

// The row kernels for one kind of Side (groups.h); rows.h has the body, rows_*.cu an instance each.
template <typename Side>
void launch_rows(const DistillationArgs& args, void* stream);

}  // namespace kldiv::cuda
