// A gradient times a factor that came after it: in place, and without a write where the factor is 1.
#include "launch.h"
#include "shapes.h"

namespace kldiv::cuda {
namespace {

template <typename scalar_t>
KLDIV_KERNEL(kElementThreads, 1)
scale_elements(scalar_t* gradient, int64_t count, const void* factor, Dtype factor_dtype) {
  using acc_t = AccOf<scalar_t>;
  const double wide_factor = load_any<double>(factor, factor_dtype, 0, 0, 1, 0).x[0];
  if (wide_factor == 1) return;
  const acc_t by = static_cast<acc_t>(wide_factor);
  // Counted from the 16-byte boundary before the gradient, so that all groups but the first lie on one.
  const int ahead =
      static_cast<int>(reinterpret_cast<uintptr_t>(gradient) % sizeof(device::Bytes16) / sizeof(scalar_t));
  for_each_group<acc_t>(ahead + count, device::block() * device::threads() + device::thread(),
                        device::blocks() * device::threads(), [&](int64_t first, int n) {
                          const int skipped = first == 0 ? ahead : 0;
                          scalar_t* data = gradient + (first + skipped - ahead);
                          Group<acc_t> group = load_group<Use::kOnce>(data, n - skipped, acc_t(0));
                          for (acc_t& x : group.x) x *= by;
                          store_group(data, n - skipped, group);
                        });
}

}  // namespace

void scale(const ScaleArgs& args, void* stream) {
  if (args.count == 0) return;
  dispatch_dtype(args.gradient.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    device::launch(scale_elements<scalar_t>, {element_blocks(args.count), kElementThreads}, stream,
                   static_cast<scalar_t*>(args.gradient.data), args.count, args.factor, args.factor_dtype);
  });
}

}  // namespace kldiv::cuda
