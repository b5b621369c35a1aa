// Every kernel on buffers without a byte to spare, for a build with -fsanitize=address,undefined.
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "divergences.h"
#include "fibers.h"
#include "row_state.h"
#include "scalar_types.h"

namespace {

using namespace kldiv;

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("%s\n", what.c_str());
  ++failures;
}

int64_t size_of(Dtype dtype) {
  int64_t size = 0;
  dispatch_dtype(dtype, [&](auto type) { size = sizeof(type); });
  return size;
}

// `count` elements that end where the allocation does, `offset` elements after a 16-byte boundary.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t count, int64_t offset = 0)
      : bytes_(new char[(count + offset) * size_of(dtype)]), data_(bytes_.get() + offset * size_of(dtype)) {}

  // Numbers between -2 and 0.
  static Buffer filled(Dtype dtype, int64_t count, int64_t offset = 0) {
    Buffer buffer(dtype, count, offset);
    dispatch_dtype(dtype, [&](auto type) {
      using scalar_t = decltype(type);
      for (int64_t i = 0; i < count; ++i) {
        static_cast<scalar_t*>(buffer.data())[i] = narrow<scalar_t>(-1 + std::sin(1.7 * static_cast<double>(i)));
      }
    });
    return buffer;
  }

  void* data() const { return data_; }

 private:
  std::unique_ptr<char[]> bytes_;
  char* data_;
};

Matrix matrix(const Buffer& buffer, Dtype dtype, int64_t row_stride, int64_t column_stride) {
  Matrix m{buffer.data(), dtype, {}};
  m.layout.dims = 1;
  m.layout.sizes[0] = 1;
  m.layout.strides[0] = row_stride;
  m.layout.column_stride = column_stride;
  return m;
}

double number(const Buffer& buffer, Dtype dtype) {
  return dtype == Dtype::kFloat64 ? *static_cast<double*>(buffer.data()) : *static_cast<float*>(buffer.data());
}

void distil(Dtype student_dtype, Dtype teacher_dtype, int64_t columns, int64_t offset, bool transposed) {
  constexpr int64_t rows = 3;
  const Buffer student = Buffer::filled(student_dtype, rows * columns, offset);
  const Buffer teacher = Buffer::filled(teacher_dtype, rows * columns, offset);
  DistillationArgs args;
  args.rows = rows;
  args.columns = columns;
  args.student = transposed ? matrix(student, student_dtype, 1, rows) : matrix(student, student_dtype, columns, 1);
  args.teacher = matrix(teacher, teacher_dtype, columns, 1);
  args.student.layout.sizes[0] = args.teacher.layout.sizes[0] = rows;
  const Dtype acc = args.acc_dtype();
  const Buffer constants(acc, rows * RowConstants<float>::kCount), row_loss(acc, rows), loss(acc, 1);
  const Buffer grad_student(student_dtype, rows * columns, offset), grad_teacher(teacher_dtype, rows * columns, offset);
  args.row_constants = constants.data();
  std::vector<unsigned char> scratch(cuda::distillation_scratch(columns), 0xff);
  if (!scratch.empty()) args.scratch = scratch.data();
  const auto gradient = [&](const Buffer& buffer, Dtype dtype) {
    LogitsGradient to{{buffer.data(), dtype}, matrix(buffer, dtype, columns, 1).layout, columns};
    to.layout.sizes[0] = rows;
    return to;
  };
  args.parameter = 0.3;
  for (const char* divergence : {"forward_kl", "skew_reverse_kl"}) {
    args.divergence = divergence;
    args.row_loss = row_loss.data();
    args.loss = loss.data();
    args.wanted = {true, false};
    args.grad_student = gradient(grad_student, student_dtype);
    args.grad_teacher = {};
    cuda::distillation(args, nullptr);
    expect(std::isfinite(number(loss, acc)), "distillation");
    args.grad_student = {};
    args.wanted = {false, false};
    cuda::distillation(args, nullptr);
    args.wanted = {true, true};
    cuda::distillation(args, nullptr);
    args.row_loss = args.loss = nullptr;
    args.grad_student = gradient(grad_student, student_dtype);
    args.grad_teacher = gradient(grad_teacher, teacher_dtype);
    cuda::distillation(args, nullptr);
  }
}

void pointwise(Dtype dtype, Dtype target_dtype, int64_t count, int64_t offset) {
  const Buffer input = Buffer::filled(dtype, count, offset), target = Buffer::filled(target_dtype, count, offset);
  const Buffer gradient(dtype, count, offset), target_gradient(target_dtype, count, offset);
  PointwiseArgs args;
  args.input = {input.data(), dtype, {}};
  args.target = {target.data(), target_dtype, {}};
  args.log_target = true;
  args.rows = 1;
  args.columns = count;
  const Dtype acc = args.acc_dtype();
  const Buffer loss(acc, 1), partials(acc, cuda::pointwise_partials(1, count)), one = Buffer::filled(acc, 1);
  args.loss = loss.data();
  args.partials = partials.data();
  cuda::pointwise(args, nullptr);
  expect(std::isfinite(number(loss, acc)), "pointwise");
  args.loss = nullptr;
  args.grad_output = {one.data(), acc, {}};
  args.grad_output.layout.column_stride = 0;
  args.grad_input = {gradient.data(), dtype};
  args.grad_target = {target_gradient.data(), target_dtype};
  cuda::pointwise(args, nullptr);
  cuda::scale({args.grad_input, count, one.data(), acc}, nullptr);
}

}  // namespace

int main() {
  kldiv::emulation::set_order(kldiv::emulation::Order::kRandom, 0);
  const std::vector<Dtype> dtypes = {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
  for (const Dtype dtype : dtypes) {
    for (const int64_t columns : {1, 7, 8, 9, 300}) {
      for (const int64_t offset : {0, 1}) distil(dtype, dtype, columns, offset, false);
    }
    for (const int64_t count : {1, 8, 31, 2100}) {
      for (const int64_t offset : {0, 3}) pointwise(dtype, dtype, count, offset);
    }
    distil(dtype, dtype, 31, 0, true);
    distil(dtype, Dtype::kFloat32, 31, 1, false);
    pointwise(dtype, Dtype::kFloat32, 31, 1);
  }
  // Rows in shared memory, fetched and not.
  for (const bool clusters : {true, false}) {
    kldiv::emulation::set_properties({clusters ? 90 : 80, 1, (clusters ? 227 : 99) * 1024, clusters});
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
      distil(dtype, dtype, 1032, 0, false);
      distil(dtype, dtype, 1032, 1, false);
      distil(dtype, dtype, 5003, 0, false);
      distil(dtype, dtype, 20'000, 0, false);
    }
  }
  return failures == 0 ? 0 : 1;
}
