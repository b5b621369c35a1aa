// What the threads of a block know, merged into one: in an order that depends on the number of threads alone.
#pragma once

#include "device.h"

namespace kldiv::cuda {

constexpr int kMaxThreads = 1024;

// Lane 0 gets the merged values of its warp.
template <typename Value, typename Merge>
KLDIV_DEVICE Value warp_reduce(Value value, const Merge& merge) {
  KLDIV_NO_UNROLL  // once per row: not worth five copies
      for (int lanes = device::kWarp / 2; lanes > 0; lanes /= 2) {
    value = merge(value, device::shuffle_down(value, lanes));
  }
  return value;
}

// Every thread gets the merged values of the block. Value{} must be neutral.
template <typename Value, typename Merge>
KLDIV_DEVICE Value block_reduce(Value value, const Merge& merge) {
  KLDIV_SHARED(Value, of_warp, kMaxThreads / device::kWarp);
  const int warp = device::thread() / device::kWarp, lane = device::thread() % device::kWarp;
  value = warp_reduce(value, merge);
  if (lane == 0) of_warp[warp] = value;
  device::barrier();
  value = lane < device::threads() / device::kWarp ? of_warp[lane] : Value{};
  device::barrier();  // the next reduction writes to of_warp
  return device::broadcast(warp_reduce(value, merge));
}

struct Plus {
  template <typename Value>
  KLDIV_DEVICE Value operator()(const Value& a, const Value& b) const {
    return a + b;
  }
};

}  // namespace kldiv::cuda
