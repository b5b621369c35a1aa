// Divergences from logits: which row kernel runs, and the sum over the rows.
#include "groups.h"
#include "launch.h"
#include "sum.h"

namespace kldiv::cuda {
namespace {

bool is_dense(const Matrix& logits, const LogitMap<double>& map, const LogitsGradient& gradient, Dtype dtype) {
  return logits.dtype == dtype && logits.layout.column_stride == 1 && map.is_identity() &&
         (gradient.out.data == nullptr || (gradient.out.dtype == dtype && gradient.layout.column_stride == 1));
}

}  // namespace

void distillation(const DistillationArgs& args, void* stream) {
  const Dtype dtype = args.student.dtype;
  const bool wide = args.acc_dtype() == Dtype::kFloat64;
  const Scaling<double> scaling(args);
  if (args.rows > 0) {
    if (is_dense(args.student, scaling.student, args.grad_student, dtype) &&
        is_dense(args.teacher, scaling.teacher, args.grad_teacher, dtype)) {
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
