// The operators on the CPU: the kernels of this machine's instruction set on torch's own threads.
#include <sys/mman.h>

#include "../operators.h"
#include "kernels.h"

namespace kldiv {
namespace {

struct Cpu {
  static cpu::Threads threads() {
    const auto parallel_for = [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
      torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
    };
    return {static_cast<int>(torch::stable::get_num_threads()), parallel_for};
  }

  static void distillation(const DistillationArgs& args, const Tensor&) {
    cpu::kernels().distillation(args, threads());
  }
  static void token_stats(const TokenStatsArgs& args, const Tensor&) { cpu::kernels().token_stats(args, threads()); }
  static void pointwise(const PointwiseArgs& args, const Tensor&) { cpu::kernels().pointwise(args, threads()); }
  static void scale(const ScaleArgs& args, const Tensor&) { cpu::kernels().scale(args, threads()); }

  static int64_t distillation_scratch(int64_t, const Tensor&) { return 0; }
  static int64_t pointwise_partials(int64_t rows, int64_t columns) { return cpu::pointwise_partials(rows, columns); }

  // The first touch of a fresh gradient costs more than its arithmetic: a page fault every 4 KiB. Huge pages,
  // where the system grants them on request, leave one every 2 MiB. A hint; nothing else changes.
  static void prepare_output(Tensor& tensor) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = 2 << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t end = begin + tensor.numel() * tensor.element_size();
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }
};

}  // namespace
}  // namespace kldiv

STABLE_TORCH_LIBRARY_IMPL(kldiv_ext, CPU, m) { KLDIV_REGISTER_OPERATORS(m, ::kldiv::Cpu); }
