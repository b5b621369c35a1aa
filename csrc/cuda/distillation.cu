// Divergences from logits: which row kernel runs, and the sum over the rows.
#include "launch.h"
#include "shapes.h"
#include "sides.h"
#include "sum.h"

namespace kldiv::cuda {

int64_t distillation_scratch(int64_t columns) { return meeting_bytes(device::properties(), columns); }

void distillation(const DistillationArgs& args, void* stream) {
  const bool wide = args.acc_dtype() == Dtype::kFloat64;
  if (args.rows > 0) {
    const Dtype dtype = args.student.dtype;
    if (is_dense(args) && is_dense(args.grad_student, dtype) && is_dense(args.grad_teacher, dtype)) {
      dispatch_dtype(dtype, [&](auto type) { launch_rows<DenseSide<decltype(type)>>(args, stream); });
    } else {
      wide ? launch_rows<AnySide<double>>(args, stream) : launch_rows<AnySide<float>>(args, stream);
    }
  }
  if (args.loss) {
    wide ? launch_sum<double>(args.row_loss, args.rows, 1, args.loss, stream)
         : launch_sum<float>(args.row_loss, args.rows, 1, args.loss, stream);
  }
}

}  // namespace kldiv::cuda
