// What is told about positions rather than trained on.
#include "rows.h"

namespace kldiv::cuda {

void token_stats(const TokenStatsArgs& args, void* stream) {
  if (args.rows == 0) return;
  if (is_dense(args)) {
    dispatch_dtype(args.student.dtype, [&](auto type) { launch_stats<DenseSide<decltype(type)>>(args, stream); });
  } else {
    args.acc_dtype() == Dtype::kFloat64 ? launch_stats<AnySide<double>>(args, stream)
                                        : launch_stats<AnySide<float>>(args, stream);
  }
}

}  // namespace kldiv::cuda
