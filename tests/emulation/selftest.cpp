// What the emulator must notice: kernels with a fault each, and reduce.h, from which the test takes barriers away.
// Prints the names of the faults that went unnoticed and returns how many.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cuda/reduce.h"

namespace {

using namespace kldiv;

constexpr int kThreads = 256;

// Two sums, one after the other: the second one must not disturb the first.
KLDIV_KERNEL(kThreads) two_sums(double* out) {
  const double first = cuda::block_reduce(1.0, cuda::Plus());
  const double second = cuda::block_reduce(first + device::thread(), cuda::Plus());
  out[device::thread()] = second;
}

KLDIV_KERNEL(kThreads) barrier_for_half(double* out) {
  if (device::thread() < kThreads / 2) device::barrier();
  out[device::thread()] = 0;
}

KLDIV_KERNEL(kThreads) shuffle_for_half_a_warp(double* out) {
  if (device::thread() % device::kWarp < device::kWarp / 2) out[device::thread()] = device::broadcast(1.0);
}

KLDIV_KERNEL(kThreads) barrier_against_shuffle(double* out) {
  if (device::thread() % 2) {
    device::barrier();
  } else {
    out[device::thread()] = device::broadcast(1.0);
  }
}

KLDIV_KERNEL(kThreads) misaligned_load(double* out) { device::load16(reinterpret_cast<char*>(out) + 8); }

KLDIV_KERNEL(kThreads) read_of_nothing(double* out) {
  KLDIV_SHARED(double, room, kThreads);
  out[device::thread()] = room[device::thread()];
}

// A neighbour's number, without waiting for it: right in one order of the threads.
KLDIV_KERNEL(kThreads) no_barrier(double* out) {
  KLDIV_SHARED(double, room, kThreads + 1);
  room[device::thread()] = 1;
  out[device::thread()] = device::thread() == 0 ? 1 : room[device::thread() - 1];
}

// Whether every order of the threads gives `expected` everywhere and no error.
bool right(void (*kernel)(double*), double expected) {
  using emulation::Order;
  for (const auto& [order, seed] :
       {std::pair{Order::kAscending, 0u}, {Order::kDescending, 0u}, {Order::kRandom, 1u}, {Order::kRandom, 2u}}) {
    emulation::set_order(order, seed);
    std::vector<double> out(kThreads, std::nan(""));
    try {
      device::launch(kernel, 1, kThreads, nullptr, out.data());
    } catch (const std::runtime_error&) {
      return false;
    }
    for (const double x : out) {
      if (x != expected) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  int unnoticed = 0;
  const auto expect_wrong = [&](const char* name, void (*kernel)(double*), double expected) {
    if (!right(kernel, expected)) return;
    std::printf("%s\n", name);
    ++unnoticed;
  };
  expect_wrong("barrier_for_half", barrier_for_half, 0);
  expect_wrong("shuffle_for_half_a_warp", shuffle_for_half_a_warp, 1);
  expect_wrong("barrier_against_shuffle", barrier_against_shuffle, 1);
  expect_wrong("misaligned_load", misaligned_load, 0);
  expect_wrong("read_of_nothing", read_of_nothing, 0);
  expect_wrong("no_barrier", no_barrier, 1);
#if defined(FAULTY_REDUCTION)
  expect_wrong("faulty reduction", two_sums, kThreads * kThreads + kThreads * (kThreads - 1) / 2);
#else
  if (!right(two_sums, kThreads * kThreads + kThreads * (kThreads - 1) / 2)) {
    std::printf("two_sums is wrong\n");
    ++unnoticed;
  }
#endif
  return unnoticed;
}
