// What the emulator must do and notice: kernels that are right, and kernels with a fault each. Prints what went
// otherwise than expected and returns how often that was.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.h"
#include "selftest_special_functions.h"

namespace {

using namespace kldiv;
using device::Shape;

constexpr int kThreads = 256;

int64_t index() { return device::block() * device::threads() + device::thread(); }

// ---------------------------------------------------------------- one block

KLDIV_KERNEL(kThreads, 1) barrier_for_half(double* out) {
  if (device::thread() < kThreads / 2) device::barrier();
  out[device::thread()] = 0;
}

KLDIV_KERNEL(kThreads, 1) shuffle_for_half_a_warp(double* out) {
  if (device::thread() % device::kWarp < device::kWarp / 2) out[device::thread()] = device::shuffle_xor(1.0, 1);
}

KLDIV_KERNEL(kThreads, 1) barrier_against_shuffle(double* out) {
  if (device::thread() % 2) {
    device::barrier();
  } else {
    out[device::thread()] = device::shuffle_xor(1.0, 1);
  }
}

KLDIV_KERNEL(kThreads, 1) misaligned_load(double* out) { device::load16(reinterpret_cast<char*>(out) + 8); }

KLDIV_KERNEL(kThreads, 1) read_of_nothing(double* out) {
  KLDIV_SHARED(double, room, kThreads);
  out[device::thread()] = room[device::thread()];
}

// A neighbour's number, without waiting for it: right in one order of the threads.
KLDIV_KERNEL(kThreads, 1) no_barrier(double* out) {
  KLDIV_SHARED(double, room, kThreads + 1);
  room[device::thread()] = 1;
  out[device::thread()] = device::thread() == 0 ? 1 : room[device::thread() - 1];
}

KLDIV_KERNEL(kThreads, 1) too_much_shared(double* out) {
  KLDIV_SHARED(double, room, 8 * 1024);
  device::dynamic_shared();
  room[device::thread()] = 1;
  out[index()] = 1;
}

// ---------------------------------------------------------------- shuffles within a part of a warp

// The lane that a value came from.
template <int kWidth>
KLDIV_KERNEL(kThreads, 1)
narrow_shuffles(double* out) {
  const int lane = device::thread() % device::kWarp;
  bool right = true;
  for (int lanes = 0; lanes < kWidth; ++lanes) {
    right = right && device::shuffle_xor(lane, lanes, kWidth) == (lane ^ lanes);
  }
  out[device::thread()] = right;
}

KLDIV_KERNEL(kThreads, 1) shuffles_of_two_widths(double* out) {
  out[device::thread()] = device::shuffle_xor(1.0, 1, device::thread() % device::kWarp < 8 ? 16 : 8);
}

// Others of the warp need not take part.
KLDIV_KERNEL(kThreads, 1) shuffle_for_some(double* out) {
  out[device::thread()] = device::thread() % device::kWarp < 8 ? device::shuffle_xor(1.0, 1, 8) : 1;
}

KLDIV_KERNEL(kThreads, 1) shuffle_of_odd_width(double* out) { out[device::thread()] = device::shuffle_xor(1.0, 1, 12); }

KLDIV_KERNEL(kThreads, 1) shuffle_too_far(double* out) { out[device::thread()] = device::shuffle_xor(1.0, 16, 16); }

// ---------------------------------------------------------------- dynamic shared memory

constexpr size_t kRoomBytes = kThreads * sizeof(double);

KLDIV_KERNEL(kThreads, 1) neighbour_in_dynamic(double* out) {
  auto* room = reinterpret_cast<double*>(device::dynamic_shared());
  room[device::thread()] = device::thread();
  device::barrier();
  const int neighbour = kThreads - 1 - device::thread();
  out[index()] = room[neighbour] == neighbour && reinterpret_cast<uintptr_t>(room) % 16 == 0;
}

KLDIV_KERNEL(kThreads, 1) read_of_nothing_in_dynamic(double* out) {
  out[index()] = reinterpret_cast<double*>(device::dynamic_shared())[device::thread()];
}

// ---------------------------------------------------------------- clusters

KLDIV_KERNEL(kThreads, 1) places(double* out) {
  const int64_t block = device::block(), cluster = emulation::position().cluster;
  out[index()] = emulation::position().rank == block % cluster ? static_cast<double>(cluster) : 0;
}

enum Fault { kNone, kNoFirstBarrier, kNoSecondBarrier, kNoBarrierAtTheEnd, kHalfEnds, kHalfAtABarrier, kOwnBarrier };

// The sum over the cluster of numbers that lie in shared memory, twice.
template <Fault kFault, bool kDynamic>
KLDIV_KERNEL(512, 1)
sum_of_peers(double* out) {
  KLDIV_SHARED(double, fixed, 512);
  double* const room = kDynamic ? reinterpret_cast<double*>(device::dynamic_shared()) : fixed;
  double sum = 0;
  const int opposite = device::threads() - 1 - device::thread();
  const double* peers[16];
  for (int rank = 0; rank < emulation::position().cluster; ++rank) peers[rank] = device::of_peer(room + opposite, rank);
  for (const int round : {0, 1}) {
    room[device::thread()] = emulation::position().rank + round + device::thread();
    if (kFault != kNoFirstBarrier) device::cluster_barrier();
    for (int rank = 0; rank < emulation::position().cluster; ++rank) sum += *peers[rank] - opposite;
    if (round == 0 && kFault != kNoSecondBarrier) device::cluster_barrier();
  }
  out[index()] = sum;
  if (kFault == kNoBarrierAtTheEnd) return;
  const bool half = emulation::position().rank == 1 && device::thread() % 2;
  if (kFault == kHalfEnds && half) return;
  if (kFault == kHalfAtABarrier && half) device::barrier();
  if (kFault == kOwnBarrier && emulation::position().rank == 1)
    device::barrier();  // no fault: peers need not take part
  device::cluster_barrier();
}
constexpr double sum_of(int cluster) { return cluster * (cluster - 1) + cluster; }

KLDIV_KERNEL(kThreads, 1) a_block_leaves(double* out) {
  out[index()] = 1;
  if (emulation::position().rank == 1) return;
  device::cluster_barrier();
}

template <int kRank>
KLDIV_KERNEL(kThreads, 1)
peer_of_rank(double* out) {
  KLDIV_SHARED(double, room, 1);
  device::of_peer(room, kRank);
  out[index()] = 1;
  device::cluster_barrier();
}

KLDIV_KERNEL(kThreads, 1) peer_of_global(double* out) {
  device::of_peer(out, 0);
  out[index()] = 1;
}

KLDIV_KERNEL(kThreads, 1) peer_that_has_ended(double* out) {
  KLDIV_SHARED(double, room, 1);
  device::cluster_barrier();
  if (emulation::position().rank == 0) device::of_peer(room, 1);
  out[index()] = 1;
}

// A peer's memory is there between two barriers.
template <bool kEarly>
KLDIV_KERNEL(kThreads, 1)
write_to_peer(double* out) {
  KLDIV_SHARED(double, room, kThreads);
  double* const peer = device::of_peer(room, (emulation::position().rank + 1) % emulation::position().cluster);
  if (!kEarly) device::cluster_barrier();
  peer[device::thread()] = 1;
  if (kEarly) device::cluster_barrier();
  out[index()] = 1;
}

KLDIV_KERNEL(kThreads, 1) write_to_peer_in_time(double* out) {
  KLDIV_SHARED(double, room, kThreads);
  double* const peer = device::of_peer(room, (emulation::position().rank + 1) % emulation::position().cluster);
  device::cluster_barrier();
  peer[device::thread()] = emulation::position().rank;
  device::cluster_barrier();
  const int cluster = emulation::position().cluster;
  out[index()] = room[device::thread()] == (emulation::position().rank + cluster - 1) % cluster;
}

// ---------------------------------------------------------------- blocks that are no cluster

uint32_t arrivals;  // in device memory

// Each waits for all.
KLDIV_KERNEL(kThreads, 1) counted(double* out) {
  if (device::thread() == 0) {
    device::arrive(&arrivals);
    device::await(&arrivals, emulation::position().cluster);
  }
  device::barrier();
  out[index()] = arrivals;
}

KLDIV_KERNEL(kThreads, 1) a_block_does_not_arrive(double* out) {
  out[index()] = 1;
  if (device::thread() > 0) return;
  if (emulation::position().rank != 1) device::arrive(&arrivals);
  device::await(&arrivals, emulation::position().cluster);
}

// ---------------------------------------------------------------- asynchronous copies

struct Numbers {
  alignas(16) double of[2 * kThreads];
  Numbers() {
    for (int i = 0; i < 2 * kThreads; ++i) of[i] = i;
  }
};
const Numbers numbers;

// Two groups of a copy each, of which `kBut` may be under way when kRead is read.
template <int kCommits, int kBut, int kRead>
KLDIV_KERNEL(kThreads, 1)
two_copies(double* out) {
  auto* const room = reinterpret_cast<double*>(device::dynamic_shared()) + 4 * device::thread();
  for (int i = 0; i < 2; ++i) {
    room[2 * i] = room[2 * i + 1] = -1;
    device::copy16_async(room + 2 * i, numbers.of + 2 * ((device::thread() + i) % kThreads));
    if (i < kCommits) device::commit_copies();
  }
  if (kBut >= 0) device::await_copies(kBut);
  const int expected = 2 * ((device::thread() + kRead) % kThreads);
  const bool right = room[2 * kRead] == expected && room[2 * kRead + 1] == expected + 1;
  const bool on_its_way = std::isnan(room[2 * kRead]) && std::isnan(room[2 * kRead + 1]);
  out[index()] = right ? 1 : on_its_way ? 2 : 0;
  device::commit_copies();
  device::await_copies(0);
}
constexpr double kArrived = 1, kOnItsWay = 2;

// Some groups wait for nothing: a loop's last rounds commit without a copy.
KLDIV_KERNEL(kThreads, 1) empty_groups(double* out) {
  auto* const room = reinterpret_cast<double*>(device::dynamic_shared()) + 4 * device::thread();
  device::copy16_async(room, numbers.of);
  device::commit_copies();
  device::commit_copies();
  device::await_copies(1);
  out[index()] = room[1];
}

// What the others copied, after a barrier or without.
template <bool kBarrier>
KLDIV_KERNEL(kThreads, 1)
copies_of_others(double* out) {
  auto* const room = reinterpret_cast<double*>(device::dynamic_shared());
  device::copy16_async(room + 2 * device::thread(), numbers.of);
  device::commit_copies();
  device::await_copies(0);
  if (kBarrier) device::barrier();
  out[index()] = room[2 * (kThreads - 1 - device::thread()) + 1];
}

template <int kTo, int kFrom>
KLDIV_KERNEL(kThreads, 1)
copy_beside(double* out) {
  device::copy16_async(device::dynamic_shared() + kTo, reinterpret_cast<const char*>(numbers.of) + kFrom);
  device::commit_copies();
  device::await_copies(0);
  out[index()] = 1;
}

KLDIV_KERNEL(kThreads, 1) copy_to_aligned_for_less(double* out) {
  KLDIV_SHARED(float, room, 4);
  device::copy16_async(room, numbers.of);
  device::await_copies(0);
  out[index()] = 1;
}

KLDIV_KERNEL(kThreads, 1) copy_to_global(double* out) {
  static device::Bytes16 global;
  device::copy16_async(&global, numbers.of);
  out[index()] = 1;
}

KLDIV_KERNEL(kThreads, 1) copy_from_shared(double* out) {
  device::copy16_async(device::dynamic_shared(), device::dynamic_shared() + 16);
  out[index()] = 1;
}

KLDIV_KERNEL(kThreads, 1) copy_to_peer(double* out) {
  device::copy16_async(device::of_peer(device::dynamic_shared(), 1 - emulation::position().rank), numbers.of);
  out[index()] = 1;
}

KLDIV_KERNEL(kThreads, 1) copy_left_alone(double* out) {
  device::copy16_async(device::dynamic_shared(), numbers.of);
  device::commit_copies();
  out[index()] = 1;
}

// ---------------------------------------------------------------- what comes of each

const char* const kRight = "right";
const char* const kWrong = "a wrong number";  // in some order

// What comes of a kernel that should give `expected` everywhere, in the first order in which it is not right.
std::string outcome(void (*kernel)(double*), const Shape& shape, double expected) {
  using emulation::Order;
  for (const auto& [order, seed] :
       {std::pair{Order::kAscending, 0u}, {Order::kDescending, 0u}, {Order::kRandom, 1u}, {Order::kRandom, 2u}}) {
    emulation::set_order(order, seed);
    std::vector<double> out(shape.blocks * shape.threads, std::nan(""));
    arrivals = 0;
    try {
      device::launch(kernel, shape, nullptr, out.data());
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    for (const double x : out) {
      if (x != expected) return kWrong;
    }
  }
  return kRight;
}

struct Case {
  const char* name;
  void (*kernel)(double*);
  double expected;
  const char* outcome;  // of an error a part of its message
  Shape shape = {1, kThreads};
};

// Kernels whose only fault is where they run.
KLDIV_KERNEL(1024, 1) nothing_wrong(double* out) { out[index()] = 1; }

constexpr Shape kPairs = {6, kThreads, 2, 2 * kRoomBytes}, kTriples = {6, kThreads, 3, kRoomBytes};
constexpr Shape kWithRoom = {2, kThreads, 1, 4 * kRoomBytes};

const Case kCases[] = {
    {"barrier_for_half", barrier_for_half, 0, "128 threads wait at a barrier, 128 threads have ended"},
    {"shuffle_for_half_a_warp", shuffle_for_half_a_warp, 1, "128 threads wait in a shuffle, 128 threads have ended"},
    {"barrier_against_shuffle", barrier_against_shuffle, 1, "128 threads wait at a barrier, 128 threads wait in a sh"},
    {"misaligned_load", misaligned_load, 0, "a misaligned 16-byte access"},
    {"read_of_nothing", read_of_nothing, 0, kWrong},
    {"no_barrier", no_barrier, 1, kWrong},
    {"too_much_shared", too_much_shared, 1, "more shared memory than", {1, kThreads, 1, 40 * 1024}},
    {"not too_much_shared", too_much_shared, 1, kRight, {1, kThreads, 1, 36 * 1024}},

    {"narrow_shuffles 8", narrow_shuffles<8>, 1, kRight},
    {"narrow_shuffles 16", narrow_shuffles<16>, 1, kRight},
    {"narrow_shuffles 32", narrow_shuffles<32>, 1, kRight},
    {"shuffles_of_two_widths", shuffles_of_two_widths, 1, "its lanes wait in different shuffles"},
    {"shuffle_for_some", shuffle_for_some, 1, kRight},
    {"shuffle_of_odd_width", shuffle_of_odd_width, 1, "a shuffle within neither 8 nor 16 nor 32 lanes"},
    {"shuffle_too_far", shuffle_too_far, 1, "a shuffle over more lanes than its width"},

    {"neighbour_in_dynamic", neighbour_in_dynamic, 1, kRight, kWithRoom},
    {"read_of_nothing_in_dynamic", read_of_nothing_in_dynamic, 0, kWrong, kWithRoom},

    {"no cluster", places, 1, kRight, {6, kThreads}},
    {"clusters of 3", places, 3, kRight, kTriples},
    {"a cluster of 16 large blocks", sum_of_peers<kNone, false>, sum_of(16), kRight, {16, 512, 16}},
    {"sum_of_peers", sum_of_peers<kNone, false>, sum_of(3), kRight, kTriples},
    {"sum_of_peers, dynamic", sum_of_peers<kNone, true>, sum_of(3), kRight, kTriples},
    {"sum_of_peers without a cluster", sum_of_peers<kNone, false>, sum_of(1), kRight},
    {"kNoFirstBarrier", sum_of_peers<kNoFirstBarrier, false>, sum_of(3), kWrong, kTriples},
    {"kNoFirstBarrier, dynamic", sum_of_peers<kNoFirstBarrier, true>, sum_of(3), kWrong, kTriples},
    {"kNoSecondBarrier", sum_of_peers<kNoSecondBarrier, false>, sum_of(3), kWrong, kTriples},
    {"kNoBarrierAtTheEnd", sum_of_peers<kNoBarrierAtTheEnd, false>, sum_of(3), kWrong, kTriples},
    {"kHalfEnds", sum_of_peers<kHalfEnds, false>, sum_of(2),
     "block 1, 128 threads wait at a cluster barrier, 128 threads have ended", kPairs},
    {"kHalfAtABarrier", sum_of_peers<kHalfAtABarrier, false>, sum_of(2),
     "block 1, 128 threads wait at a barrier, 128 threads wait at a cluster barrier", kPairs},
    {"kOwnBarrier", sum_of_peers<kOwnBarrier, false>, sum_of(2), kRight, kPairs},
    {"a_block_leaves", a_block_leaves, 1,
     "block 0, 256 threads wait at a cluster barrier; of block 1, 256 threads have ended", kPairs},
    {"the last peer", peer_of_rank<2>, 1, kRight, kTriples},
    {"one peer too many", peer_of_rank<3>, 1, "no block of that rank", kTriples},
    {"peer -1", peer_of_rank<-1>, 1, "no block of that rank", kTriples},
    {"peer_of_global", peer_of_global, 1, "not in the block's own shared memory", kTriples},
    {"peer_that_has_ended", peer_that_has_ended, 1, "a block that has ended", kPairs},
    {"write_to_peer too early", write_to_peer<true>, 1, "before it had begun", kPairs},
    {"write_to_peer too late", write_to_peer<false>, 1, "after it had ended", kPairs},
    {"write_to_peer_in_time", write_to_peer_in_time, 1, kRight, kTriples},
    {"a cluster that does not divide", nothing_wrong, 1, "a launch of", {7, kThreads, 2}},
    {"a cluster of 17", nothing_wrong, 1, "a launch of", {17, kThreads, 17}},
    {"a cluster of 0", nothing_wrong, 1, "a launch of", {16, kThreads, 0}},
    {"a cluster of -1", nothing_wrong, 1, "a launch of", {16, kThreads, -1}},
    {"all of the shared memory", nothing_wrong, 1, kRight, {2, 64, 2, 100 * 1024}},
    {"more shared memory", nothing_wrong, 1, "a launch of", {2, 64, 2, 100 * 1024 + 1}},

    {"two copies, both awaited", two_copies<2, 0, 1>, kArrived, kRight, kWithRoom},
    {"two copies, the first awaited", two_copies<2, 1, 0>, kArrived, kRight, kWithRoom},
    {"two copies, the second not awaited", two_copies<2, 1, 1>, kOnItsWay, kRight, kWithRoom},
    {"two copies, neither awaited", two_copies<2, 2, 0>, kOnItsWay, kRight, kWithRoom},
    {"two copies, no wait", two_copies<2, -1, 0>, kOnItsWay, kRight, kWithRoom},
    {"two copies, one committed and awaited", two_copies<1, 0, 0>, kArrived, kRight, kWithRoom},
    {"two copies, one not committed", two_copies<1, 0, 1>, kOnItsWay, kRight, kWithRoom},
    {"empty_groups", empty_groups, 1, kRight, kWithRoom},
    {"copies_of_others", copies_of_others<true>, 1, kRight, kWithRoom},
    {"copies_of_others without a barrier", copies_of_others<false>, 1, kWrong, kWithRoom},
    {"copy to the last 16 bytes", copy_beside<4 * kRoomBytes - 16, 0>, 1, kRight, kWithRoom},
    {"copy across the end", copy_beside<16, 0>, 1, "elsewhere than the block's shared", {1, kThreads, 1, 24}},
    {"copy beyond the end", copy_beside<4 * kRoomBytes, 0>, 1, "elsewhere than the block's shared", kWithRoom},
    {"copy to a misaligned place", copy_beside<8, 0>, 1, "a misaligned 16-byte access", kWithRoom},
    {"copy from a misaligned place", copy_beside<0, 8>, 1, "a misaligned 16-byte access", kWithRoom},
    {"copy_to_aligned_for_less", copy_to_aligned_for_less, 1, "a misaligned 16-byte access"},
    {"copy_to_global", copy_to_global, 1, "elsewhere than the block's shared memory"},
    {"copy_from_shared", copy_from_shared, 1, "from shared memory", kWithRoom},
    {"copy_to_peer", copy_to_peer, 1, "elsewhere than the block's shared memory", kPairs},
    {"copy_left_alone", copy_left_alone, 1, "ended without awaiting its copies", kWithRoom},
};

}  // namespace

int main() {
  int unexpected = 0;
  const auto expect = [&](const char* name, const std::string& actual, const std::string& expected) {
    if (actual.find(expected) != std::string::npos) return;
    std::printf("%s: %s, not %s\n", name, actual.c_str(), expected.c_str());
    ++unexpected;
  };
  expect("a cluster where there are none", outcome(write_to_peer_in_time, kTriples, 1), "no clusters");
  expect("a cluster's barrier where there are none", outcome(a_block_leaves, kPairs, 1), "no clusters");
  expect("blocks that meet", outcome(counted, {3, kThreads, 3}, 3), kRight);
  expect("a block does not arrive", outcome(a_block_does_not_arrive, kPairs, 1),
         "1 threads wait for a count, 255 threads have ended; of block 1, 1 threads wait for a count");
  expect("65 blocks together", outcome(nothing_wrong, {65, 32, 65}, 1), "a launch of");
  emulation::Properties properties = device::properties();
  properties.clusters = true;
  emulation::set_properties(properties);
  for (const Case& c : kCases) expect(c.name, outcome(c.kernel, c.shape, c.expected), c.outcome);
  return unexpected + emulation::wrong_special_functions();
}
