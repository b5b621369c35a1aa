// The operators on CUDA: the kernels on torch's current stream of the tensors' device.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../operators.h"
#include "launch.h"

namespace kldiv {
namespace {

struct Cuda {
  // Calls launch(stream), with that device current; reports what CUDA says to it.
  template <typename Launch>
  static void on_stream_of(const Tensor& tensor, const Launch& launch) {
    const auto device = tensor.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    launch(stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void distillation(const DistillationArgs& args, const Tensor& like) {
    check_columns(args);
    on_stream_of(like, [&](void* stream) { cuda::distillation(args, stream); });
  }
  static void token_stats(const TokenStatsArgs& args, const Tensor& like) {
    check_columns(args);
    on_stream_of(like, [&](void* stream) { cuda::token_stats(args, stream); });
  }
  static void pointwise(const PointwiseArgs& args, const Tensor& like) {
    on_stream_of(like, [&](void* stream) { cuda::pointwise(args, stream); });
  }
  static void scale(const ScaleArgs& args, const Tensor& like) {
    on_stream_of(like, [&](void* stream) { cuda::scale(args, stream); });
  }

  static int64_t distillation_scratch(int64_t columns, const Tensor& like) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    return cuda::distillation_scratch(columns);
  }
  static int64_t pointwise_partials(int64_t rows, int64_t columns) { return cuda::pointwise_partials(rows, columns); }
  static void prepare_output(Tensor&) {}

 private:
  // Columns are counted in 32 bits.
  static void check_columns(const LogitsArgs& args) {
    STD_TORCH_CHECK(args.columns <= INT32_MAX, "kldiv_ext: a vocabulary of ", args.columns,
                    ", above 2^31 - 1, on CUDA");
  }
};

}  // namespace
}  // namespace kldiv

STABLE_TORCH_LIBRARY_IMPL(kldiv_ext, CUDA, m) { KLDIV_REGISTER_OPERATORS(m, ::kldiv::Cuda); }
