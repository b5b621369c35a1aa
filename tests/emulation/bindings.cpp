// The kernels' entry points for ctypes. Each returns null or what went wrong.
#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "args.h"
#include "cuda/launch.h"
#include "cuda/shapes.h"
#include "fibers.h"

namespace {

using kldiv::LogitsGradient;
using kldiv::Matrix;
using kldiv::Output;

template <typename Function>
const char* message_of(const Function& function) {
  static std::string message;
  try {
    function();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

void emulated_set_order(int order, uint32_t seed) {
  kldiv::emulation::set_order(static_cast<kldiv::emulation::Order>(order), seed);
}

void emulated_set_device(int compute_capability, int multiprocessors, int64_t shared_bytes_per_block, bool clusters) {
  kldiv::emulation::set_properties(
      {compute_capability, multiprocessors, static_cast<size_t>(shared_bytes_per_block), clusters});
}

// Of csrc/cuda/units.h, for n numbers: Decay's ratio, expm1 and excess of |x|, Log1p's value and shortfall of x, and a
// column's p - q and p (log p - log q) - p + q where log p is 0 and log q is -x.
void emulated_units(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i, out += 7) {
    const kldiv::Decay<float> decay(kldiv::absolute(x[i]));
    const kldiv::Log1p<float> logarithm(x[i]);
    const kldiv::Pair<float> pair(x[i], 0, static_cast<float>(-x[i] * kldiv::kLog2E));
    const float all[] = {decay.ratio,         decay.expm1,       decay.excess,         logarithm.value,
                         logarithm.shortfall, pair.difference(), pair.teacher_excess()};
    std::copy(std::begin(all), std::end(all), out);
  }
}

// What a launch over so many rows looks like on the present device: blocks, threads, cluster, bytes of shared memory.
void emulated_resident_shape(int64_t rows, int64_t columns, int64_t scalar_bytes, int64_t* shape) {
  const auto active = [](const auto& shape) { return kldiv::device::active_clusters(emulated_resident_shape, shape); };
  const auto [blocks, threads, cluster, bytes] = kldiv::cuda::resident_shape(kldiv::device::properties(), rows, columns,
                                                                             static_cast<size_t>(scalar_bytes), active);
  std::copy_n(std::initializer_list<int64_t>{blocks, threads, cluster, static_cast<int64_t>(bytes)}.begin(), 4, shape);
}
// And, where rows are streamed: blocks, threads, how many threads of a block share a row, and how many blocks.
void emulated_row_shape(int64_t rows, int64_t columns, bool wide, bool sums, int64_t* shape) {
  const auto [launch, width, per_row] =
      kldiv::cuda::row_shape(rows, columns, wide ? kldiv::cuda::kMaxSlowRowThreads : kldiv::cuda::kMaxRowThreads, sums);
  std::copy_n(std::initializer_list<int64_t>{launch.blocks, launch.threads, width, per_row}.begin(), 4, shape);
}

const char* emulated_distillation(const Matrix* student, const Matrix* teacher, const LogitsGradient* grad_student,
                                  const LogitsGradient* grad_teacher, int wants_student, int wants_teacher,
                                  int64_t rows, int64_t columns, const char* divergence, double parameter,
                                  double temperature, double scale, double hard_scale, double student_scale,
                                  double teacher_scale, double student_cap, double teacher_cap, const int64_t* labels,
                                  const void* row_scale, const void* grad_output, int64_t grad_output_stride,
                                  void* row_constants, void* row_loss, void* loss) {
  kldiv::DistillationArgs args;
  args.student = *student;
  args.teacher = *teacher;
  args.grad_student = *grad_student;
  args.grad_teacher = *grad_teacher;
  args.wanted = {wants_student != 0, wants_teacher != 0};
  args.rows = rows;
  args.columns = columns;
  args.divergence = divergence;
  args.parameter = parameter;
  args.temperature = temperature;
  args.soft_scale = scale;
  args.hard_scale = hard_scale;
  args.student_scale = student_scale;
  args.teacher_scale = teacher_scale;
  args.student_cap = student_cap;
  args.teacher_cap = teacher_cap;
  args.labels = labels;
  args.row_scale = row_scale;
  args.grad_output = grad_output;
  args.grad_output_stride = grad_output_stride;
  args.row_constants = row_constants;
  args.row_loss = row_loss;
  args.loss = loss;
  std::vector<unsigned char> scratch(kldiv::cuda::distillation_scratch(columns), 0xff);
  if (!scratch.empty()) args.scratch = scratch.data();
  return message_of([&] { kldiv::cuda::distillation(args, nullptr); });
}

const char* emulated_token_stats(const Matrix* student, const Matrix* teacher, int64_t rows, int64_t columns,
                                 double temperature, double student_scale, double teacher_scale, double student_cap,
                                 double teacher_cap, const int64_t* labels, const void* row_scale, void* row_stats) {
  kldiv::TokenStatsArgs args;
  args.student = *student;
  args.teacher = *teacher;
  args.rows = rows;
  args.columns = columns;
  args.temperature = temperature;
  args.student_scale = student_scale;
  args.teacher_scale = teacher_scale;
  args.student_cap = student_cap;
  args.teacher_cap = teacher_cap;
  args.labels = labels;
  args.row_scale = row_scale;
  args.row_stats = row_stats;
  return message_of([&] { kldiv::cuda::token_stats(args, nullptr); });
}

const char* emulated_pointwise(const Matrix* input, const Matrix* target, bool log_target, int64_t rows,
                               int64_t columns, double scale, const Output* output, void* loss, void* partials,
                               const Matrix* grad_output, const Output* grad_input, const Output* grad_target) {
  kldiv::PointwiseArgs args;
  args.input = *input;
  args.target = *target;
  args.log_target = log_target;
  args.rows = rows;
  args.columns = columns;
  args.scale = scale;
  args.output = *output;
  args.loss = loss;
  args.partials = partials;
  args.grad_output = *grad_output;
  args.grad_input = *grad_input;
  args.grad_target = *grad_target;
  return message_of([&] { kldiv::cuda::pointwise(args, nullptr); });
}

int64_t emulated_pointwise_partials(int64_t rows, int64_t columns) {
  return kldiv::cuda::pointwise_partials(rows, columns);
}

const char* emulated_scale(const Output* gradient, int64_t count, const void* factor, int32_t factor_dtype) {
  return message_of(
      [&] { kldiv::cuda::scale({*gradient, count, factor, static_cast<kldiv::Dtype>(factor_dtype)}, nullptr); });
}

}  // extern "C"
