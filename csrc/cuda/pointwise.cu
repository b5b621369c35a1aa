// The drop-in: KL divergence of given log-probabilities, element by element. Elements are counted along the rows, so
// that neither shape nor strides change a sum.
#include "../divergences.h"
#include "launch.h"
#include "shapes.h"
#include "sum.h"

namespace kldiv::cuda {
namespace {

// How elements are fetched. DenseElements: everything scalar_t, one behind the other.
template <typename scalar_t>
struct DenseElements {
  using acc_t = AccOf<scalar_t>;

  KLDIV_DEVICE static Group<acc_t> load(const Matrix& matrix, int64_t /*columns*/, int64_t first, int n,
                                        acc_t padding) {
    return load_group<Use::kOnce>(static_cast<const scalar_t*>(matrix.data) + first, n, padding);
  }
  KLDIV_DEVICE static void store(const Output& output, int64_t first, int n, const Group<acc_t>& group) {
    store_group(static_cast<scalar_t*>(output.data) + first, n, group);
  }
};

template <typename acc>
struct AnyElements {
  using acc_t = acc;

  static KLDIV_DEVICE_CALL Group<acc_t> load(const Matrix& matrix, int64_t columns, int64_t first, int n,
                                             acc_t padding) {
    const auto within_row = [&](int64_t row, int64_t column, int count) {
      const int64_t stride = matrix.layout.column_stride;
      return gather(matrix.data, matrix.dtype, matrix.layout.offset(row) + column * stride, stride, count, padding);
    };
    int64_t row = first / columns, column = first - row * columns;
    if (column + n <= columns) return within_row(row, column, n);
    Group<acc_t> group;
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      group.x[i] = i < n ? within_row(row, column, 1).x[0] : padding;
      if (++column == columns) {
        column = 0;
        ++row;
      }
    }
    return group;
  }
  static KLDIV_DEVICE_CALL void store(const Output& output, int64_t first, int n, Group<acc_t> group) {
    scatter(output.data, output.dtype, first, 1, n, group);
  }
};

// uniform_grad: grad_output is a single number.
template <bool kLogTarget, typename Elements>
KLDIV_KERNEL(kElementThreads, 1)
pointwise_elements(KLDIV_ARGUMENT PointwiseArgs args, bool uniform_grad) {
  using KL = PointwiseKL<kLogTarget>;
  using acc_t = typename Elements::acc_t;
  constexpr acc_t kNoTarget = kLogTarget ? -__builtin_inff() : 0;  // contributes 0
  const acc_t scale = static_cast<acc_t>(args.scale);
  Group<acc_t> grad_output{};
  if (uniform_grad) {
    const acc_t grad = load_any<acc_t>(args.grad_output.data, args.grad_output.dtype, 0, 0, 1, 0).x[0];
    for (acc_t& x : grad_output.x) x = grad;
  }
  acc_t sum = 0;
  for_each_group<acc_t>(
      args.rows * args.columns, device::block() * device::threads() + device::thread(),
      device::blocks() * device::threads(), [&](int64_t first, int n) {
        const auto load = [&](const Matrix& matrix, acc_t padding) {
          return Elements::load(matrix, args.columns, first, n, padding);
        };
        const auto store = [&](const Output& output, const auto& value) {
          Group<acc_t> group;
          KLDIV_UNROLL
          for (int i = 0; i < kGroup<acc_t>; ++i) group.x[i] = value(i);
          Elements::store(output, first, n, group);
        };
        const Group<acc_t> target = load(args.target, kNoTarget);
        const Group<acc_t> input = args.input.data ? load(args.input, 0) : Group<acc_t>{};
        if (args.loss) {
          acc_t of_group = 0;
          KLDIV_UNROLL
          for (int i = 0; i < kGroup<acc_t>; ++i) of_group += KL::term(input.x[i], target.x[i]);
          sum += of_group;
        }
        if (args.output.data) store(args.output, [&](int i) { return KL::term(input.x[i], target.x[i]) * scale; });
        if (args.grad_output.data) {
          const Group<acc_t> grad = uniform_grad ? grad_output : load(args.grad_output, 0);
          const auto product = [&](int i, acc_t slope) {  // a zero slope stays 0 whatever comes in
            return slope == 0 ? acc_t(0) : grad.x[i] * scale * slope;
          };
          if (args.grad_input.data) {
            store(args.grad_input, [&](int i) { return product(i, KL::grad_input(input.x[i], target.x[i])); });
          }
          if (args.grad_target.data) {
            store(args.grad_target, [&](int i) { return product(i, KL::grad_target(input.x[i], target.x[i])); });
          }
        }
      });
  if (args.loss) {
    sum = Team<false>(device::threads()).all(sum, Sum());
    if (device::thread() == 0) static_cast<acc_t*>(args.partials)[device::block()] = sum;
  }
}

// Contiguous and of this dtype, or absent.
bool is_dense(const Matrix& matrix, int64_t columns, Dtype dtype) {
  const RowLayout& layout = matrix.layout;
  const bool rows_back_to_back = layout.dims == 0 || (layout.dims == 1 && layout.strides[0] == columns);
  return matrix.data == nullptr || (matrix.dtype == dtype && layout.column_stride == 1 && rows_back_to_back);
}
bool is_dense(const Output& output, Dtype dtype) { return output.data == nullptr || output.dtype == dtype; }

bool is_uniform(const RowLayout& layout) {
  bool uniform = layout.column_stride == 0;
  for (int d = 0; d < layout.dims; ++d) uniform = uniform && layout.strides[d] == 0;
  return uniform;
}

template <bool kLogTarget, typename Elements>
void launch_elements(const PointwiseArgs& args, bool uniform_grad, void* stream) {
  device::launch(pointwise_elements<kLogTarget, Elements>, {element_blocks(args.rows * args.columns), kElementThreads},
                 stream, args, uniform_grad);
}

template <typename Elements>
void launch_elements(const PointwiseArgs& args, bool uniform_grad, void* stream) {
  args.log_target ? launch_elements<true, Elements>(args, uniform_grad, stream)
                  : launch_elements<false, Elements>(args, uniform_grad, stream);
}

}  // namespace

int64_t pointwise_partials(int64_t rows, int64_t columns) { return element_blocks(rows * columns); }

void pointwise(const PointwiseArgs& args, void* stream) {
  const Dtype dtype = args.target.dtype;
  const bool wide = args.acc_dtype() == Dtype::kFloat64;
  const bool uniform_grad = args.grad_output.data && is_uniform(args.grad_output.layout);
  if (args.rows * args.columns > 0) {
    if (is_dense(args.target, args.columns, dtype) && is_dense(args.input, args.columns, dtype) &&
        (uniform_grad || is_dense(args.grad_output, args.columns, dtype)) && is_dense(args.output, dtype) &&
        is_dense(args.grad_input, dtype) && is_dense(args.grad_target, dtype)) {
      dispatch_dtype(dtype,
                     [&](auto type) { launch_elements<DenseElements<decltype(type)>>(args, uniform_grad, stream); });
    } else {
      wide ? launch_elements<AnyElements<double>>(args, uniform_grad, stream)
           : launch_elements<AnyElements<float>>(args, uniform_grad, stream);
    }
  }
  if (args.loss) {
    const int64_t partials = pointwise_partials(args.rows, args.columns);
    wide ? launch_sum<double>(args.partials, partials, args.scale, args.loss, stream)
         : launch_sum<float>(args.partials, partials, args.scale, args.loss, stream);
  }
}

}  // namespace kldiv::cuda
