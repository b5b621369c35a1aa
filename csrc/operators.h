// Where torch meets the kernels: each operator allocates its outputs, fills in the arguments and launches. Written
// once over a Device that supplies the launches; cpu/register.cpp and cuda/register.cpp name it to the dispatcher.
//
// Arguments come checked from Python (kldiv_ext/checks.py); what is checked here only keeps a direct call of
// torch.ops.kldiv_ext from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "args.h"
#include "options.h"
#include "row_state.h"

namespace kldiv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct LossArguments {
  KLDIV_LOSS_OPTIONS(KLDIV_MEMBER)
};

struct StatsArguments {
  KLDIV_STATS_OPTIONS(KLDIV_MEMBER)
};

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "kldiv_ext: expected a float64, float32, float16 or bfloat16 tensor");
  }
}

inline ScalarType scalar_type_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The last dimension is the columns; leading dimensions that lie evenly behind each other become one.
inline RowLayout row_layout(const Tensor& tensor) {
  RowLayout layout;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t last = tensor.dim() - 1;
  layout.column_stride = strides[last];
  for (int64_t d = 0; d < last; ++d) {
    if (sizes[d] == 1) continue;
    if (layout.dims > 0 && layout.strides[layout.dims - 1] == sizes[d] * strides[d]) {
      layout.sizes[layout.dims - 1] *= sizes[d];
      layout.strides[layout.dims - 1] = strides[d];
    } else {
      STD_TORCH_CHECK(layout.dims < RowLayout::kMaxDims, "kldiv_ext: more than ", RowLayout::kMaxDims,
                      " leading dimensions that do not lie evenly behind each other; call .contiguous() first");
      layout.sizes[layout.dims] = sizes[d];
      layout.strides[layout.dims++] = strides[d];
    }
  }
  return layout;
}

inline Matrix matrix(const Tensor& tensor) { return {tensor.const_data_ptr(), dtype_of(tensor), row_layout(tensor)}; }

inline int64_t columns_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

// In all dimensions, or in all but the last.
inline bool same_shape(const Tensor& a, const Tensor& b, bool but_the_last = false) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim() - (but_the_last ? 1 : 0); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline void check_pair(const char* op, const Tensor& a, const Tensor& b, bool but_the_last = false) {
  STD_TORCH_CHECK(a.dim() > 0 && same_shape(a, b, but_the_last), "kldiv_ext::", op,
                  ": the two tensors must have one shape");
  STD_TORCH_CHECK(a.device() == b.device(), "kldiv_ext::", op, ": the two tensors must be on one device");
}

// [rows] of `dtype`, contiguous, on the same device; or [], where that is allowed.
inline void check_rows(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows,
                       const Tensor& like, bool scalar_allowed = false) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.device() == like.device() &&
                      (tensor.dim() == 1 ? tensor.size(0) == rows : tensor.dim() == 0 && scalar_allowed),
                  "kldiv_ext::", op, ": ", name, " must be contiguous, [rows], of the right dtype, on the same device");
}

inline Output output(Tensor& tensor) { return {tensor.mutable_data_ptr(), dtype_of(tensor)}; }

// A gradient like `input` but contiguous, or [0] where it is not wanted.
template <typename Device>
Tensor new_gradient(const Tensor& input, bool wanted) {
  if (!wanted) return torch::stable::new_empty(input, {0});
  Tensor gradient = torch::stable::new_empty(input, input.sizes());
  Device::prepare_output(gradient);
  return gradient;
}

inline LogitsGradient logits_gradient(Tensor& gradient) {
  return {output(gradient), row_layout(gradient), columns_of(gradient)};
}

// 1 / divisor, or 1 without one.
inline double reciprocal(const char* op, std::optional<int64_t> divisor) {
  STD_TORCH_CHECK(divisor.value_or(1) > 0, "kldiv_ext::", op, ": divisor must be positive");
  return 1 / static_cast<double>(divisor.value_or(1));
}

// The options of both structs, checked and written into `args`.
template <typename Options>
void set_logits(LogitsArgs& args, const char* op, const Tensor& student, const Tensor& teacher,
                const Options& options) {
  check_pair(op, student, teacher, options.valid_vocab.has_value());
  args.student = matrix(student);
  args.teacher = matrix(teacher);
  args.rows = rows_of(student);
  args.columns = options.valid_vocab.value_or(columns_of(student));
  STD_TORCH_CHECK(args.columns > 0 && args.columns <= columns_of(student) && args.columns <= columns_of(teacher),
                  "kldiv_ext::", op, ": the vocabulary is empty, or valid_vocab exceeds it");
  STD_TORCH_CHECK(options.logit_scale.size() == 2 && options.logit_softcap.size() == 2, "kldiv_ext::", op,
                  ": logit_scale and logit_softcap must be [student, teacher]");
  args.student_scale = options.logit_scale[0];
  args.teacher_scale = options.logit_scale[1];
  args.student_cap = options.logit_softcap[0];
  args.teacher_cap = options.logit_softcap[1];
  args.temperature = options.temperature;
  if (options.labels.has_value()) {
    check_rows(op, "labels", *options.labels, ScalarType::Long, args.rows, student);
    args.labels = static_cast<const int64_t*>(options.labels->const_data_ptr());
  }
  if (options.row_scale.has_value()) {
    check_rows(op, "row_scale", *options.row_scale, scalar_type_of(args.acc_dtype()), args.rows, student);
    args.row_scale = options.row_scale->const_data_ptr();
  }
}

inline DistillationArgs distillation_args(const char* op, const Tensor& student, const Tensor& teacher,
                                          const LossArguments& options) {
  DistillationArgs args;
  set_logits(args, op, student, teacher, options);
  STD_TORCH_CHECK(options.hard_scale == 0 || options.labels.has_value(), "kldiv_ext::", op,
                  ": hard_scale needs labels");
  if (options.hard_scale == 0) args.labels = nullptr;
  STD_TORCH_CHECK(dispatch_divergence(options.divergence, options.parameter, [](const auto&) {}), "kldiv_ext::", op,
                  ": unknown divergence ", options.divergence);
  // A part of scale 0 is absent: it contributes 0, not 0 * inf.
  if (options.soft_scale != 0) args.divergence = options.divergence;
  args.parameter = options.parameter;
  const double factor = reciprocal(op, options.divisor);
  args.soft_scale = options.soft_scale * factor;
  args.hard_scale = options.hard_scale * factor;
  return args;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(Tensor student,
                                                             Tensor teacher KLDIV_LOSS_OPTIONS(KLDIV_PARAMETER),
                                                             bool grad_student, bool grad_teacher,
                                                             bool grads_in_forward) {
  const LossArguments options{KLDIV_LOSS_OPTIONS(KLDIV_ARGUMENT)};
  DistillationArgs args = distillation_args("distillation_loss", student, teacher, options);
  const bool reduce = options.divisor.has_value();
  const ScalarType acc = scalar_type_of(args.acc_dtype());
  Tensor row_loss = torch::stable::new_empty(student, {args.rows}, acc);
  Tensor row_constants = torch::stable::new_empty(student, {args.rows, RowConstants<float>::kCount}, acc);
  Tensor loss = reduce ? torch::stable::new_empty(student, {}, acc) : row_loss;
  const int64_t scratch_bytes = Device::distillation_scratch(args.columns, student);
  Tensor scratch = scratch_bytes > 0 ? torch::stable::new_empty(student, {scratch_bytes}, ScalarType::Byte) : row_loss;
  args.wanted = {grad_student, grad_teacher};
  Tensor student_gradient = new_gradient<Device>(student, grads_in_forward && grad_student);
  Tensor teacher_gradient = new_gradient<Device>(teacher, grads_in_forward && grad_teacher);
  args.row_loss = row_loss.mutable_data_ptr();
  args.row_constants = row_constants.mutable_data_ptr();
  if (reduce) args.loss = loss.mutable_data_ptr();
  if (scratch_bytes > 0) args.scratch = scratch.mutable_data_ptr();
  if (grads_in_forward && grad_student) args.grad_student = logits_gradient(student_gradient);
  if (grads_in_forward && grad_teacher) args.grad_teacher = logits_gradient(teacher_gradient);
  Device::distillation(args, student);
  return {loss, row_constants, student_gradient, teacher_gradient};
}

inline void set_grad_output(DistillationArgs& args, const char* op, const Tensor& grad_output, const Tensor& student) {
  check_rows(op, "grad_output", grad_output, scalar_type_of(args.acc_dtype()), args.rows, student, true);
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_stride = grad_output.dim() > 0 ? 1 : 0;
}

inline void set_backward(DistillationArgs& args, const char* op, const Tensor& grad_output, const Tensor& row_constants,
                         const Tensor& student) {
  set_grad_output(args, op, grad_output, student);
  STD_TORCH_CHECK(dtype_of(row_constants) == args.acc_dtype() && row_constants.is_contiguous() &&
                      row_constants.device() == student.device() &&
                      row_constants.numel() == args.rows * RowConstants<float>::kCount,
                  "kldiv_ext::", op, ": row_constants must be what distillation_loss returned");
  args.row_constants = const_cast<void*>(row_constants.const_data_ptr());
}

template <typename Device>
std::tuple<Tensor, Tensor> distillation_loss_backward(Tensor grad_output, Tensor student, Tensor teacher,
                                                      Tensor row_constants KLDIV_LOSS_OPTIONS(KLDIV_PARAMETER),
                                                      bool grad_student, bool grad_teacher) {
  const char* op = "distillation_loss_backward";
  const LossArguments options{KLDIV_LOSS_OPTIONS(KLDIV_ARGUMENT)};
  DistillationArgs args = distillation_args(op, student, teacher, options);
  set_backward(args, op, grad_output, row_constants, student);
  args.wanted = {grad_student, grad_teacher};
  Tensor student_gradient = new_gradient<Device>(student, grad_student);
  Tensor teacher_gradient = new_gradient<Device>(teacher, grad_teacher);
  if (grad_student) args.grad_student = logits_gradient(student_gradient);
  if (grad_teacher) args.grad_teacher = logits_gradient(teacher_gradient);
  Device::distillation(args, student);
  return {student_gradient, teacher_gradient};
}

template <typename Device>
Tensor distillation_loss_backward_(Tensor grad_output, Tensor student, Tensor teacher,
                                   Tensor row_constants KLDIV_LOSS_OPTIONS(KLDIV_PARAMETER), bool grad_teacher) {
  const char* op = "distillation_loss_backward_";
  const LossArguments options{KLDIV_LOSS_OPTIONS(KLDIV_ARGUMENT)};
  DistillationArgs args = distillation_args(op, student, teacher, options);
  set_backward(args, op, grad_output, row_constants, student);
  args.wanted = {true, grad_teacher};
  args.grad_student = logits_gradient(student);
  Tensor teacher_gradient = new_gradient<Device>(teacher, grad_teacher);
  if (grad_teacher) args.grad_teacher = logits_gradient(teacher_gradient);
  Device::distillation(args, student);
  return teacher_gradient;
}

template <typename Device>
void distillation_loss_out(Tensor student, Tensor teacher KLDIV_LOSS_OPTIONS(KLDIV_PARAMETER),
                           std::optional<Tensor> grad_output, Tensor row_loss, std::optional<Tensor> student_gradient,
                           std::optional<Tensor> teacher_gradient) {
  const char* op = "distillation_loss_out";
  const LossArguments options{KLDIV_LOSS_OPTIONS(KLDIV_ARGUMENT)};
  DistillationArgs args = distillation_args(op, student, teacher, options);
  const ScalarType acc = scalar_type_of(args.acc_dtype());
  check_rows(op, "row_loss", row_loss, acc, args.rows, student);
  Tensor row_constants = torch::stable::new_empty(student, {args.rows, RowConstants<float>::kCount}, acc);
  const int64_t scratch_bytes = Device::distillation_scratch(args.columns, student);
  Tensor scratch = scratch_bytes > 0 ? torch::stable::new_empty(student, {scratch_bytes}, ScalarType::Byte) : row_loss;
  if (grad_output.has_value()) set_grad_output(args, op, *grad_output, student);
  args.row_loss = row_loss.mutable_data_ptr();
  args.row_constants = row_constants.mutable_data_ptr();
  if (scratch_bytes > 0) args.scratch = scratch.mutable_data_ptr();
  args.wanted = {student_gradient.has_value(), teacher_gradient.has_value()};
  if (args.wanted.student) {
    check_pair(op, *student_gradient, student);
    args.grad_student = logits_gradient(*student_gradient);
  }
  if (args.wanted.teacher) {
    check_pair(op, *teacher_gradient, teacher);
    args.grad_teacher = logits_gradient(*teacher_gradient);
  }
  Device::distillation(args, student);
}

template <typename Device>
Tensor token_stats(Tensor student, Tensor teacher KLDIV_STATS_OPTIONS(KLDIV_PARAMETER)) {
  const StatsArguments options{KLDIV_STATS_OPTIONS(KLDIV_ARGUMENT)};
  TokenStatsArgs args;
  set_logits(args, "token_stats", student, teacher, options);
  Tensor stats =
      torch::stable::new_empty(student, {args.rows, RowStats<float>::kCount}, scalar_type_of(args.acc_dtype()));
  args.row_stats = stats.mutable_data_ptr();
  Device::token_stats(args, student);
  return stats;
}

template <typename Device>
Tensor new_output(Tensor like, std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  Device::prepare_output(tensor);
  return tensor;
}

template <typename Device>
void scale_(Tensor gradient, Tensor factor) {
  STD_TORCH_CHECK(gradient.is_contiguous() && factor.numel() == 1 && gradient.device() == factor.device(),
                  "kldiv_ext::scale_: a contiguous gradient and one factor on its device are needed");
  ScaleArgs args;
  args.gradient = output(gradient);
  args.count = gradient.numel();
  args.factor = factor.const_data_ptr();
  args.factor_dtype = dtype_of(factor);
  Device::scale(args, gradient);
}

inline PointwiseArgs pointwise_args(const char* op, const Tensor& target, std::optional<int64_t> divisor,
                                    bool log_target) {
  PointwiseArgs args;
  args.target = matrix(target);
  args.rows = rows_of(target);
  args.columns = columns_of(target);
  args.log_target = log_target;
  args.scale = reciprocal(op, divisor);
  return args;
}

// Contiguous tensors are one long row, so that short rows cost nothing.
inline void flatten_if(PointwiseArgs& args, bool contiguous) {
  if (!contiguous) return;
  args.columns *= args.rows;
  args.rows = 1;
}

template <typename Device>
Tensor kl_div(Tensor input, Tensor target, std::optional<int64_t> divisor, bool log_target) {
  check_pair("kl_div", input, target);
  PointwiseArgs args = pointwise_args("kl_div", target, divisor, log_target);
  args.input = matrix(input);
  flatten_if(args, input.is_contiguous() && target.is_contiguous());
  const ScalarType acc = scalar_type_of(args.acc_dtype());
  if (!divisor.has_value()) {
    const bool same = input.scalar_type() == target.scalar_type();
    Tensor terms = torch::stable::new_empty(input, input.sizes(), same ? input.scalar_type() : acc);
    args.output = output(terms);
    Device::pointwise(args, input);
    return terms;
  }
  Tensor loss = torch::stable::new_empty(input, {}, acc);
  Tensor partials = torch::stable::new_empty(input, {Device::pointwise_partials(args.rows, args.columns)}, acc);
  args.loss = loss.mutable_data_ptr();
  args.partials = partials.mutable_data_ptr();
  Device::pointwise(args, input);
  return loss;
}

template <typename Device>
std::tuple<Tensor, Tensor> kl_div_backward(Tensor grad_output, std::optional<Tensor> input, Tensor target,
                                           std::optional<int64_t> divisor, bool log_target, bool grad_input,
                                           bool grad_target) {
  const char* op = "kl_div_backward";
  PointwiseArgs args = pointwise_args(op, target, divisor, log_target);
  bool contiguous = target.is_contiguous();
  if (input.has_value()) {
    check_pair(op, *input, target);
    args.input = matrix(*input);
    contiguous = contiguous && input->is_contiguous();
  }
  STD_TORCH_CHECK(input.has_value() || !grad_target, "kldiv_ext::", op, ": grad_target needs input");
  if (grad_output.dim() == 0) {
    args.grad_output = {grad_output.const_data_ptr(), dtype_of(grad_output), {}};
    args.grad_output.layout.column_stride = 0;
  } else {
    check_pair(op, grad_output, target);
    args.grad_output = matrix(grad_output);
    contiguous = contiguous && grad_output.is_contiguous();
  }
  flatten_if(args, contiguous);
  const Tensor& like = input.has_value() ? *input : target;
  Tensor input_gradient = new_gradient<Device>(like, grad_input);
  Tensor target_gradient = new_gradient<Device>(target, grad_target);
  if (grad_input) args.grad_input = output(input_gradient);
  if (grad_target) args.grad_target = output(target_gradient);
  Device::pointwise(args, target);
  return {input_gradient, target_gradient};
}

// Inside STABLE_TORCH_LIBRARY_IMPL: every operator, for one device.
#define KLDIV_REGISTER_OPERATORS(m, Device)                                                        \
  m.impl("distillation_loss", TORCH_BOX(&::kldiv::distillation_loss<Device>));                     \
  m.impl("distillation_loss_backward", TORCH_BOX(&::kldiv::distillation_loss_backward<Device>));   \
  m.impl("distillation_loss_backward_", TORCH_BOX(&::kldiv::distillation_loss_backward_<Device>)); \
  m.impl("distillation_loss_out", TORCH_BOX(&::kldiv::distillation_loss_out<Device>));             \
  m.impl("token_stats", TORCH_BOX(&::kldiv::token_stats<Device>));                                 \
  m.impl("new_output", TORCH_BOX(&::kldiv::new_output<Device>));                                   \
  m.impl("scale_", TORCH_BOX(&::kldiv::scale_<Device>));                                           \
  m.impl("kl_div", TORCH_BOX(&::kldiv::kl_div<Device>));                                           \
  m.impl("kl_div_backward", TORCH_BOX(&::kldiv::kl_div_backward<Device>))

}  // namespace kldiv
