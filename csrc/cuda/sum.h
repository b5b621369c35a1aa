// The last step of a reduction: many parts into one number, in double and in an order that depends on their count
// alone.
#pragma once

#include "team.h"

namespace kldiv::cuda {

constexpr int kSumThreads = 1024;

template <typename acc_t>
KLDIV_KERNEL(kSumThreads, 1)
sum_parts(const acc_t* parts, int64_t count, double scale, acc_t* sum) {
  double mine = 0;
  constexpr int kLoads = 8;  // under way at a time: nobody else is there to hide their latency
  for (int64_t i = device::thread(); i < count; i += kLoads * device::threads()) {
    acc_t loaded[kLoads];
    KLDIV_UNROLL
    for (int j = 0; j < kLoads; ++j) {
      const int64_t at = i + j * device::threads();
      loaded[j] = at < count ? parts[at] : acc_t(0);
    }
    KLDIV_UNROLL
    for (int j = 0; j < kLoads; ++j) mine += static_cast<double>(loaded[j]);
  }
  const double total = Team<false>(kSumThreads).all(mine, Sum());
  if (device::thread() == 0) *sum = static_cast<acc_t>(total * scale);
}

// Host side.
template <typename acc_t>
void launch_sum(const void* parts, int64_t count, double scale, void* sum, void* stream) {
  device::launch(sum_parts<acc_t>, {1, kSumThreads}, stream, static_cast<const acc_t*>(parts), count, scale,
                 static_cast<acc_t*>(sum));
}

}  // namespace kldiv::cuda
