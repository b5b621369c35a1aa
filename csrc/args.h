// What a kernel is told: pointers, shapes, strides and options. The border between torch and the kernels,
// which know nothing of it.
#pragma once

#include <string_view>

#include "platform.h"

namespace kldiv {

enum class Dtype : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Where the rows of an n-D tensor start: its leading dimensions, adjacent ones merged where strides allow.
struct RowLayout {
  static constexpr int kMaxDims = 8;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
  int64_t column_stride = 1;

  KLDIV_HD int64_t offset(int64_t row) const {
    int64_t total = 0;
    for (int d = dims - 1; d > 0; --d) {
      const int64_t outer = row / sizes[d];
      total += (row - outer * sizes[d]) * strides[d];
      row = outer;
    }
    return dims > 0 ? total + row * strides[0] : 0;
  }
};

struct Matrix {
  const void* data = nullptr;  // [rows, columns]
  Dtype dtype = Dtype::kFloat32;
  RowLayout layout;
};

// An output: contiguous; not wanted where data is null.
struct Output {
  void* data = nullptr;  // [rows, columns]
  Dtype dtype = Dtype::kFloat32;
};

// The gradient of logits, in rows of their own length; it may have another dtype, or lie over the logits themselves.
struct LogitsGradient {
  Output out;
  RowLayout layout;
  int64_t columns = 0;  // of a whole row: what lies beyond DistillationArgs::columns becomes 0
};

struct Sides {
  bool student = false, teacher = false;
};

// What is read: two sides' logits, row by row. acc_t below is float, or double where either side is double.
struct LogitsArgs {
  Matrix student, teacher;
  int64_t rows = 0, columns = 0;                // a row may be longer: the rest is padding and never read
  double student_scale = 1, teacher_scale = 1;  // multiply the logits
  double student_cap = 0, teacher_cap = 0;      // then cap * tanh(z / cap), unless cap is 0
  double temperature = 1;
  const int64_t* labels = nullptr;  // [rows]; out of [0, columns) the result is NaN; null where there are none
  const void* row_scale = nullptr;  // [rows] acc_t, multiplies a row's loss; a row whose scale is 0 is never read
  Dtype acc_dtype() const {
    return student.dtype == Dtype::kFloat64 || teacher.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  }
};

struct DistillationArgs : LogitsArgs {
  LogitsGradient grad_student, grad_teacher;
  // Whose gradients are made: by this call, all of them, or from row_constants by a later backward.
  Sides wanted;
  std::string_view divergence;  // empty for none
  double parameter = 0;
  double soft_scale = 1;              // multiplies every row's divergence
  double hard_scale = 0;              // multiplies every row's cross entropy against labels, at temperature 1
  const void* grad_output = nullptr;  // acc_t, multiplies gradients; [rows] or, with stride 0, one for all
  int64_t grad_output_stride = 0;
  void* row_constants = nullptr;  // [rows, RowConstants::kCount] acc_t; written by forward, read by backward
  void* row_loss = nullptr;       // [rows] acc_t; null in backward
  void* loss = nullptr;           // [] acc_t, the sum of row_loss; or null
  void* scratch = nullptr;        // for forward's own use: as many bytes as the device asks for
};

struct TokenStatsArgs : LogitsArgs {
  void* row_stats = nullptr;  // [rows, RowStats::kCount] acc_t
};

// KL divergence of given log-probabilities. Forward where `loss` or `output` is set, backward where a gradient is.
struct PointwiseArgs {
  Matrix input, target;  // log-probabilities; probabilities or, with log_target, their logarithms
  bool log_target = false;
  int64_t rows = 0, columns = 0;
  double scale = 1;          // multiplies loss and gradients
  Output output;             // the terms one by one, without a divisor
  void* loss = nullptr;      // [] acc_t
  void* partials = nullptr;  // scratch of the sum, acc_t: as many as the device asks for
  Matrix grad_output;        // any strides, also all 0
  Output grad_input, grad_target;
  Dtype acc_dtype() const {
    return input.dtype == Dtype::kFloat64 || target.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  }
};

// gradient *= factor, in place; nothing is written where the factor is 1.
struct ScaleArgs {
  Output gradient;
  int64_t count = 0;
  const void* factor = nullptr;  // [] factor_dtype
  Dtype factor_dtype = Dtype::kFloat32;
};

}  // namespace kldiv
